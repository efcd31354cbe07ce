"""The life of an action as data: a simulated platform answers the steps, a simulated clock passes the time."""

from __future__ import annotations

import dataclasses
import json
import math
from datetime import timedelta
from typing import Any, Callable, Union

import pytest

from tests import cases
from zamp_sdk import ActionFailedError, ActionTimeoutError, HttpClientError, RetryPolicy, transport
from zamp_sdk.action_executor import lifecycle
from zamp_sdk.action_executor.lifecycle import Send, Sleep, Steps
from zamp_sdk.action_executor.params import Call
from zamp_sdk.action_executor.redaction import Redactor
from zamp_sdk.action_executor.replies import ActionReply, read_poll
from zamp_sdk.transport import Failure

UNSENT = Failure("connection refused", may_have_left=False, may_retry=True)
LOST = Failure("connection reset", may_have_left=True, may_retry=True)
UNTRUSTED = Failure("certificate verify failed", may_have_left=False, may_retry=False)
TOO_LONG = Failure("the reply is over 64 MiB", may_have_left=True, may_retry=False)
REQUEST = Call("POST", "/actions")
TOKEN = "sk_live_0123456789abcdef"
REDACT = Redactor(TOKEN)

Answer = Union[transport.Reply, Failure]
"""What a simulated platform answers; the step that is answered reads it."""


def reply(status_code: int = 200, body: Any = None, **headers: str) -> transport.Reply:
    """Make a reply with a JSON body; ``retry_after="1"`` is a header."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return transport.Reply(status_code, names, body if isinstance(body, bytes) else json.dumps(body).encode())


def ended(status: str, result: Any = None, error: Any = None) -> ActionReply:
    """Read a reply that says how an action has ended."""
    body = json.dumps({"id": "act-1", "status": status, "result": result, "error": error}).encode()
    return read_poll("act-1", transport.Reply(200, {}, body), REDACT, 0.0)


STARTED = reply(body={"id": "act-1"})
RUNNING = reply(body={"id": "act-1", "status": "RUNNING"})
COMPLETED = reply(body={"id": "act-1", "status": "COMPLETED", "result": 1})


class Simulation:
    """Performs steps against a function that answers, in no time but the simulated."""

    def __init__(self, answer: Callable[[Simulation], Answer], *, round_trip: float = 0.0, jitter: float = 0.5) -> None:
        self.now = 1000.0
        self.in_line = 0.0
        self.is_limited = False
        """Whether refusals are for all to heed, so that a pace keeps their Retry-After."""
        self.sent: list[float] = []
        self.slept: list[float] = []
        self.warnings: list[str] = []
        self.timeouts: list[float] = []
        self._answer = answer
        self._round_trip = round_trip
        self._jitter = jitter

    def clock(self) -> float:
        return self.now

    def asking_clock(self) -> float:
        return self.now - self.in_line

    def jitter(self) -> float:
        return self._jitter

    def perform(self, steps: Steps) -> ActionReply:
        answer: lifecycle.Answer | None = None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as stop:
                result: ActionReply = stop.value
                return result
            answer = None
            if isinstance(step, Send):
                self.sent.append(self.now)
                self.timeouts.append(step.timeout)
                assert len(self.sent) < 10_000
                came = self._answer(self)
                answer = came if isinstance(came, Failure) else step.read(came, REDACT, 0.0)
                if self.is_limited and isinstance(answer, ActionReply):
                    answer = answer._replace(is_paced=lifecycle.is_refusal(answer))
                self.now += self._round_trip
            else:
                assert step.seconds >= 0
                self.warnings += [step.warning] if step.warning else []
                self.slept.append(step.seconds)
                self.now += step.seconds

    def start(self) -> ActionReply:
        return self.perform(lifecycle.start(REQUEST, asking_clock=self.asking_clock, jitter=self.jitter))

    def follow(self, *, started_at: float | None = 1000.0, limit: float = math.inf) -> ActionReply:
        steps = lifecycle.follow(
            "act-1",
            clock=self.clock,
            asking_clock=self.asking_clock,
            jitter=self.jitter,
            started_at=started_at,
            limit=limit,
        )
        return self.perform(steps)


def always(answer: Answer) -> Simulation:
    """Simulate a platform that gives one answer to everything."""
    return Simulation(lambda _: answer)


def in_turn(*answers: Answer) -> Simulation:
    """Simulate a platform that gives these answers, one after the other."""
    iterator = iter(answers)
    return Simulation(lambda _: next(iterator))


# --- starting ---------------------------------------------------------------------------------------------------------


def test_start_returns_the_reply() -> None:
    """A start that is accepted is one request, and its reply is returned."""
    simulation = always(STARTED)
    assert simulation.start().action_id == "act-1"
    assert len(simulation.sent) == 1


REFUSALS = [reply(429), reply(429, retry_after="1"), reply(503, retry_after="1")]


@pytest.mark.parametrize("answer", [UNSENT, *REFUSALS])
def test_start_is_retried_if_the_action_cannot_exist(answer: Answer) -> None:
    """A start that was not sent, or was refused unprocessed, is sent again and can succeed."""
    simulation = in_turn(answer, answer, answer, STARTED)
    assert simulation.start().action_id == "act-1"
    assert len(simulation.sent) == 4


@pytest.mark.parametrize(
    ("answer", "times_sent", "may_have_started"),
    [
        (UNSENT, 4, False),
        (UNTRUSTED, 1, False),
        (LOST, 1, True),
        (TOO_LONG, 1, True),
        *((reply(code), 1, True) for code in (100, 101, *cases.MAY_PASS, *cases.ELSEWHERE)),
        *((reply(code), 1, False) for code in cases.REFUSED),
        (reply(204, b""), 1, True),
        (reply(200, b"<html>"), 1, True),
        (reply(200, []), 1, True),
        (reply(200, {}), 1, True),
        *((reply(200, {"id": action_id}), 1, True) for action_id in cases.NO_IDS),
        (reply(200, {"data": None, "error": {"message": "quota exceeded"}}), 1, True),
    ],
)
def test_start_fails(answer: Answer, times_sent: int, may_have_started: bool) -> None:
    """Whatever else becomes of a start raises at once, and says whether the action may exist."""
    simulation = always(answer)
    with pytest.raises(HttpClientError) as caught:
        simulation.start()
    assert len(simulation.sent) == times_sent
    assert caught.value.may_have_started is may_have_started
    assert ("may have started" in str(caught.value)) is may_have_started
    assert caught.value.status_code == (answer.status_code if isinstance(answer, transport.Reply) else None)


@pytest.mark.parametrize("told", ["0", "7", "3600"])
def test_a_refused_request_goes_back_to_the_line(told: str) -> None:
    """Who is refused asks again at once, and after a backoff from the second time on: the line keeps Retry-After."""
    refused = reply(429, retry_after=told)
    simulation = in_turn(refused, refused, refused, STARTED)
    simulation.is_limited = True
    simulation.start()
    assert simulation.slept == [0.0, 0.25, 0.5]
    simulation = in_turn(refused, refused, refused, COMPLETED)
    simulation.is_limited = True
    simulation.follow()
    assert simulation.slept == [0.0, 0.25, 0.5]


@pytest.mark.parametrize(("told", "waits"), [("0", 0.5), ("7", 7.0), ("3600", 120.0)])
def test_who_alone_is_refused_waits_as_long_as_it_asks(told: str, waits: float) -> None:
    """Where a refusal tells of no limit, so that nobody else heeds it, who met it waits as Retry-After says."""
    simulation = in_turn(reply(429, retry_after=told), reply(429), STARTED)
    simulation.start()
    assert simulation.slept == [waits, 0.5]


def test_waiting_for_a_turn_counts_against_no_failure() -> None:
    """The 5 minutes of refusals, and of failed polls, are without the time in the line; the caller's limit is not."""

    def refuse_from_a_long_line(self: Simulation) -> Answer:
        self.now, self.in_line = self.now + 1000, self.in_line + 1000
        return STARTED if len(self.sent) == 8 else reply(429)

    assert Simulation(refuse_from_a_long_line).start().action_id == "act-1"
    with pytest.raises(ActionTimeoutError):
        Simulation(refuse_from_a_long_line).follow(limit=5000.0)


@pytest.mark.parametrize("answer", REFUSALS)
def test_a_refused_start_is_tried_for_five_minutes(answer: Answer) -> None:
    """A start that is refused is tried until 5 minutes after its first refusal, and then has not started."""
    simulation = always(answer)
    with pytest.raises(HttpClientError) as caught:
        simulation.start()
    assert simulation.sent[-1] == pytest.approx(1300.0)
    assert len(simulation.sent) > 4
    assert caught.value.may_have_started is False


def test_a_start_that_does_not_get_through_is_tried_for_a_minute() -> None:
    """Tries that take 30 s each are two, for a third would begin after the window."""
    simulation = Simulation(lambda _: UNSENT, round_trip=30.0)
    with pytest.raises(HttpClientError):
        simulation.start()
    assert len(simulation.sent) == 2


def test_the_tries_of_a_connection_count_anew_after_a_refusal() -> None:
    """Who was refused has got through, so that connections that fail later are tried as often as at first."""
    simulation = in_turn(UNSENT, UNSENT, UNSENT, reply(429), UNSENT, UNSENT, UNSENT, STARTED)
    assert simulation.start().action_id == "act-1"
    assert len(simulation.sent) == 8


def test_the_five_minutes_of_a_start_count_from_its_first_refusal() -> None:
    """Connections that fail between two refusals do not give a start more time."""
    simulation = Simulation(lambda self: UNSENT if len(self.sent) % 2 else reply(429))
    with pytest.raises(HttpClientError):
        simulation.start()
    assert 1300.0 <= simulation.now < 1330.0


def test_start_keeps_the_id_of_a_refusal() -> None:
    """An error that comes with an id is raised with the id."""
    with pytest.raises(HttpClientError) as caught:
        always(reply(200, {"id": "act-1", "error": "boom"})).start()
    assert (caught.value.action_id, caught.value.may_have_started) == ("act-1", True)


def test_start_understands_an_envelope() -> None:
    """A start's reply may come inside an envelope, and may already have a status."""
    answer = reply(200, {"data": {"id": "act-1", "status": "COMPLETED", "result": 1}, "error": None})
    assert always(answer).start() == ActionReply(200, "act-1", "COMPLETED", 1, size=len(answer.body))


@pytest.mark.parametrize(
    ("answer", "advice"),
    [
        (reply(401, {"error": "bad token"}), "bad token (check the token)"),
        (reply(307, b"", location="https://evil.example/"), "this one points to https://evil.example/"),
        (reply(307, b""), "redirects are not followed; this one points to nowhere; check the base URL"),
        (reply(403, b""), "the token may lack the permission, or something between here and the platform"),
        (reply(404, b""), "check the action's name, and the base URL with its path"),
        (reply(407, b""), "a proxy wants a user name and a password"),
        (reply(599, b"x"), "HTTP 599: x"),
    ],
)
def test_errors_say_what_to_do(answer: transport.Reply, advice: str) -> None:
    """A refusal's message has the platform's reason and what to do about it."""
    with pytest.raises(HttpClientError) as caught:
        always(answer).start()
    assert advice in str(caught.value)
    assert caught.value.headers == answer.headers
    assert caught.value.response_body == answer.body.decode()


# --- following --------------------------------------------------------------------------------------------------------


def test_a_slow_platform_is_left_in_peace() -> None:
    """Polls that take longer than their interval are still followed by half of it."""
    simulation = Simulation(lambda self: COMPLETED if len(self.sent) > 5 else RUNNING, round_trip=5.0)
    simulation.follow()
    assert all(slept >= 0.5 * 0.3 * 5**0.5 for slept in simulation.slept)


def test_intervals_count_from_sending_to_sending() -> None:
    """The round trip is part of the interval, so that a distant platform is polled as often as a near one."""
    simulation = Simulation(lambda self: COMPLETED if len(self.sent) > 3 else RUNNING, round_trip=0.04)
    simulation.follow()
    assert [round(sent - 1000.0, 3) for sent in simulation.sent] == [0.0, 0.1, 0.2, 0.3]


@pytest.mark.parametrize(("told", "slept"), [("0", 0.1), ("7", 7.0), ("3600", 30.0)])
def test_retry_after_of_a_good_reply(told: str, slept: float) -> None:
    """Retry-After on a good reply sets the next interval, from 0.1 to 30 s."""
    simulation = in_turn(reply(200, {"status": "RUNNING"}, retry_after=told), COMPLETED)
    simulation.follow()
    assert simulation.slept == [slept]


PASSING: list[Answer] = [
    UNSENT,
    LOST,
    *(reply(code) for code in (100, 429, *cases.MAY_PASS)),
    reply(204, b""),
    reply(200, b'{"status": "RUNN'),
    reply(200, []),
    reply(200, {}),
    reply(200, {"id": "act-1", "status": 7}),
    reply(200, {"data": None, "error": None}),
]
FINAL: list[Answer] = [
    UNTRUSTED,
    TOO_LONG,
    *(reply(code) for code in (*cases.ELSEWHERE, *cases.REFUSED)),
    reply(200, {"data": None, "error": {"message": "quota exceeded"}}),
]


@pytest.mark.parametrize("answer", PASSING)
def test_a_poll_survives(answer: Answer) -> None:
    """A failure that may pass costs a wait, and the result still comes."""
    simulation = in_turn(RUNNING, answer, answer, answer, COMPLETED)
    assert simulation.follow().result == 1
    assert simulation.slept[1:] == [0.25, 0.5, 1.0]  # full jitter of 0.5: half of 0.5, 1 and 2 s


@pytest.mark.parametrize("answer", PASSING)
def test_a_poll_is_given_up_after_five_minutes(answer: Answer) -> None:
    """Without one good reply in 5 minutes the wait ends, with the action's id."""
    simulation = always(answer)
    with pytest.raises(HttpClientError) as caught:
        simulation.follow()
    assert simulation.now == pytest.approx(1300.0)
    assert (caught.value.action_id, caught.value.may_have_started) == ("act-1", False)


@pytest.mark.parametrize("answer", FINAL)
def test_a_poll_fails_at_once(answer: Answer) -> None:
    """A failure that will not pass is raised at once, with the action's id."""
    simulation = in_turn(RUNNING, answer)
    with pytest.raises(HttpClientError) as caught:
        simulation.follow(started_at=None)
    assert caught.value.action_id == "act-1"


def test_one_good_reply_resets_the_failures() -> None:
    """The 5 minutes and the backoff begin anew with every good reply."""
    simulation = Simulation(lambda self: COMPLETED if self.now > 2000 else RUNNING if len(self.sent) % 4 == 0 else LOST)
    assert simulation.follow().result == 1
    assert max(simulation.slept) <= 33


def test_a_process_that_was_frozen_between_two_polls_goes_on() -> None:
    """The 5 minutes begin with the first failure: the time in which nobody asked says nothing of the platform."""
    now = 0.0
    steps = lifecycle.follow(
        "act-1",
        clock=lambda: now,
        asking_clock=lambda: now,
        jitter=lambda: 0.5,
        started_at=None,
        limit=math.inf,
    )
    next(steps)
    assert isinstance(steps.send(ActionReply(200, "act-1", "RUNNING")), Sleep)
    now = 3600.0
    next(steps)
    now = 3601.0
    assert isinstance(steps.send(LOST), Sleep)


def test_backoff_reaches_thirty_seconds() -> None:
    """The backoff doubles from 0.5 s to 30 s and stays there; it survives any number of failures."""
    assert [lifecycle.backoff(failures, 1.0) for failures in (1, 2, 3, 6, 7, 8, 10**6)] == [0.5, 1, 2, 16, 30, 30, 30]
    assert lifecycle.backoff(5, 0.0) == 0


@pytest.mark.parametrize(("told", "slept"), [("0", 0.5), ("7", 7.0), ("3600", 120.0)])
def test_retry_after_of_a_failed_poll(told: str, slept: float) -> None:
    """A poll that fails in another way waits as it is told, from 0.5 to 120 s."""
    simulation = in_turn(reply(502, retry_after=told), COMPLETED)
    simulation.follow()
    assert simulation.slept == [slept]


def test_not_found_just_after_the_start() -> None:
    """For 10 s after the start, 404 is the platform catching up; then it is an error."""
    assert in_turn(reply(404), reply(404), COMPLETED).follow().result == 1
    simulation = always(reply(404))
    with pytest.raises(HttpClientError) as caught:
        simulation.follow()
    assert 1010 <= simulation.now < 1030
    assert (caught.value.status_code, caught.value.action_id) == (404, "act-1")


def test_not_found_of_an_action_started_elsewhere() -> None:
    """An id that somebody else gave us, and that the platform does not know, is an error at once."""
    simulation = always(reply(404))
    with pytest.raises(HttpClientError):
        simulation.follow(started_at=None)
    assert len(simulation.sent) == 1


def test_the_limit() -> None:
    """When the limit is over the error names the action, says that it goes on, and came after a last poll."""
    simulation = always(RUNNING)
    with pytest.raises(ActionTimeoutError, match=r"act-1 had not ended after 60\.0 s; it goes on") as caught:
        simulation.follow(limit=60.0)
    assert simulation.sent[-1] == pytest.approx(1060.0)
    assert (caught.value.action_id, caught.value.status) == ("act-1", "RUNNING")
    assert caught.value.waited == pytest.approx(60.0)


def test_a_limit_of_zero_polls_once() -> None:
    """A limit of zero asks once."""
    simulation = always(RUNNING)
    with pytest.raises(ActionTimeoutError):
        simulation.follow(limit=0.0)
    assert len(simulation.sent) == 1
    assert simulation.timeouts == [1.0]
    assert always(COMPLETED).follow(limit=0.0).result == 1


def test_the_limit_while_polls_fail() -> None:
    """A limit that is over while polls fail is a timeout that tells the last failure as its cause."""
    with pytest.raises(ActionTimeoutError) as caught:
        always(LOST).follow(limit=20.0)
    assert isinstance(caught.value.__cause__, HttpClientError)
    assert caught.value.status == ""


@pytest.mark.parametrize("status", ["COMPLETED", "FAILED", "CANCELED", "TERMINATED", "TIMED_OUT", "PAUSED"])
def test_the_end(status: str) -> None:
    """Every status but RUNNING ends the polling, one that nobody knows if it comes with an error."""
    assert always(reply(200, {"status": status, "error": "e"})).follow().status == status


def test_look() -> None:
    """Looking is one request; what is no status is an error with the id."""
    assert always(RUNNING).perform(lifecycle.look("act-1")).status == "RUNNING"
    simulation = always(reply(503))
    with pytest.raises(HttpClientError) as caught:
        simulation.perform(lifecycle.look("act-1"))
    assert (len(simulation.sent), caught.value.action_id) == (1, "act-1")


# --- the outcome, and the limit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", [None, 0, False, {"a": 1}])
def test_result(result: Any) -> None:
    """A completed action has its result, whatever that is."""
    assert lifecycle.outcome("act-1", ended("COMPLETED", result)) == result


@pytest.mark.parametrize("status", ["FAILED", "CANCELED", "TERMINATED", "TIMED_OUT"])
def test_failure(status: str) -> None:
    """An action that ended without a result is an error with id, status and reason."""
    with pytest.raises(ActionFailedError, match=f"^action act-1 ended as {status}: boom$") as caught:
        lifecycle.outcome("act-1", ended(status, error={"message": "boom", "code": 7}))
    assert (caught.value.action_id, caught.value.status) == ("act-1", status)
    assert caught.value.error == {"message": "boom", "code": 7}


def test_unknown_status_that_ended() -> None:
    """An action that ended with a status that nobody knows is an error that says so."""
    with pytest.raises(ActionFailedError, match=r"'PAUSED', which this version .* and ended: boom") as caught:
        lifecycle.outcome("act-1", ended("PAUSED", error="boom"))
    assert caught.value.status == "PAUSED"


@pytest.mark.parametrize("end", [{"error": "e"}, {"result": 1}, {"result": 0}])
def test_unknown_statuses_are_waited_for(end: dict[str, Any]) -> None:
    """A status that nobody knows is waited for, and warned of once, unless it comes with an error or a result."""
    queued, paused = (reply(200, {"id": "act-1", "status": status}) for status in ("QUEUED", "PAUSED"))
    simulation = in_turn(queued, queued, paused, RUNNING, queued, COMPLETED)
    assert simulation.follow().result == 1
    [warning] = simulation.warnings
    assert "act-1" in warning
    assert "'QUEUED'" in warning
    assert in_turn(queued, reply(200, {"status": "MERGED", **end})).follow().status == "MERGED"


def test_looking_at_an_unknown_status() -> None:
    """Asked how an action stands, a status that nobody knows is an error that names it, and no failed action."""
    with pytest.raises(HttpClientError, match=r"act-1 has the status 'QUEUED'") as caught:
        always(reply(200, {"status": "QUEUED"})).perform(lifecycle.look("act-1"))
    assert caught.value.action_id == "act-1"


def test_the_limit_with_an_unknown_status() -> None:
    """A wait that ends while the status is one that nobody knows tells that status."""
    with pytest.raises(ActionTimeoutError) as caught:
        always(reply(200, {"status": "QUEUED"})).follow(limit=10.0)
    assert caught.value.status == "QUEUED"


# --- what a peer wrote ------------------------------------------------------------------------------------------------


def nested(depth: int) -> bytes:
    """Return JSON lists inside each other."""
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize("error", [nested(700), nested(900), b'{"a":' * 400 + b"1" + b"}" * 400])
def test_an_error_that_is_nested_deeply(error: bytes) -> None:
    """However deeply an action's error is nested, it is an ActionFailedError with the id."""
    failed = always(reply(200, b'{"status": "FAILED", "error": ' + error + b"}")).follow()
    with pytest.raises(ActionFailedError, match=r"^action act-1 ended as FAILED: .") as caught:
        lifecycle.outcome("act-1", failed)
    assert caught.value.error


def test_what_can_never_be_read() -> None:
    """Valid JSON that Python cannot read is said at once, and of a start that it may have started all the same."""
    answer = reply(200, b'{"id": "act-1", "status": "COMPLETED", "result": ' + nested(200_000) + b"}")
    with pytest.raises(HttpClientError, match="nested too deeply") as caught:
        in_turn(answer).follow()
    assert caught.value.action_id == "act-1"
    with pytest.raises(HttpClientError, match="nested too deeply") as caught:
        always(answer).start()
    assert (caught.value.may_have_started, caught.value.action_id) == (True, None)


@pytest.mark.parametrize("action_id", ["act_999", "a/b", 7, ["act-1"], "ACT-1"])
def test_a_poll_that_names_another_action(action_id: Any) -> None:
    """A reply about another action is no reply, and the platform is asked again."""
    other = reply(200, {"id": action_id, "status": "COMPLETED", "result": "another's"})
    assert in_turn(other, COMPLETED).follow().result == 1


@pytest.mark.parametrize("action_id", cases.BAD_IDS)
def test_an_id_that_get_handle_refuses(action_id: str) -> None:
    """What get_handle refuses is no id of a start either: it is shown on one printable line, and kept whole."""
    with pytest.raises(HttpClientError, match="no usable id") as caught:
        always(reply(200, {"id": action_id})).start()
    assert str(caught.value).isprintable()
    assert (caught.value.action_id, caught.value.may_have_started) == (None, True)
    assert json.dumps(action_id) in str(caught.value.response_body)


@pytest.mark.parametrize(
    "answer",
    [
        reply(307, b"", location="https://evil.example/" + "x" * 60_000),
        reply(302, b"", location="/\x1b[2J\r\n\x07"),
        reply(500, {"error": "\x1b[2J" + "x\n" * 60_000}),
        reply(500, b"\x1b[2J" + b"x\r\n" * 60_000),
        reply(200, {"error": {"message": "\x1b[2J" + "x\n" * 60_000}}),
        reply(200, b"\x1b[2J" + b"x\n" * 60_000),
    ],
)
def test_what_a_peer_wrote_is_one_printable_line(answer: transport.Reply) -> None:
    """Messages show a few hundred printable characters of a peer's text; attributes have it whole."""
    with pytest.raises(HttpClientError) as caught:
        always(answer).start()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    assert caught.value.response_body == answer.body.decode()
    assert caught.value.headers == answer.headers


def test_a_long_error_of_an_action_is_one_printable_line() -> None:
    """An action's error is shown in a few hundred printable characters, and kept whole."""
    error = "\x1b[2J" + "x\n" * 1_000_000
    with pytest.raises(ActionFailedError) as caught:
        lifecycle.outcome("act-1", ended("FAILED", error=error))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    assert caught.value.error == error


def test_a_failure_names_its_action_and_its_type() -> None:
    """An action that failed is told by its name and its error's type, where they are known."""
    error = {"message": "expired", "type": "CardError"}
    with pytest.raises(ActionFailedError) as caught:
        lifecycle.outcome("act-1", ended("FAILED", error=error), "charge_card")
    assert str(caught.value) == "action act-1 (charge_card) ended as FAILED: CardError: expired"


@pytest.mark.parametrize("echo", [TOKEN, f"Bearer {TOKEN} is wrong", TOKEN.replace("s", "\\u0073"), TOKEN[:12] + "..."])
@pytest.mark.parametrize("code", [200, 307, 401, 500])
def test_no_error_shows_the_token(echo: str, code: int) -> None:
    """A reply that echoes the token does not bring it into an error's message or attributes."""
    body = f'{{"error": {{"message": "{echo}"}}}}'.encode()
    with pytest.raises(HttpClientError) as caught:
        always(reply(code, body, location=f"/{echo}", **{echo.replace("-", "_"): echo})).start()
    assert "sk_live_0123" not in f"{caught.value} {vars(caught.value)}"


@pytest.mark.parametrize("token", ["act", "act-1", "test", "RUN", "FAILED", "token", "status", "asking for action"])
def test_a_token_like_our_own_words(token: str) -> None:
    """Ids, statuses, attribute names and our own words stay as they are, whatever the token is."""
    redact = Redactor(token)
    failed_reply = read_poll("act-1", reply(body={"id": "act-1", "status": "FAILED", "error": "no"}), redact, 0.0)
    with pytest.raises(ActionFailedError) as failed:
        lifecycle.outcome("act-1", failed_reply)
    assert str(failed.value) == "action act-1 ended as FAILED: no"
    assert vars(failed.value) == {"message": str(failed.value), "action_id": "act-1", "status": "FAILED", "error": "no"}
    steps = lifecycle.look("act-1")
    step = next(steps)
    assert isinstance(step, Send)
    with pytest.raises(HttpClientError) as refused:
        steps.send(step.read(reply(400, {"error": "no"}), redact, 0.0))
    assert str(refused.value) == "asking for action act-1: HTTP 400 Bad Request: no"
    assert refused.value.action_id == "act-1"


def seconds(value: float) -> timedelta:
    """Make a timedelta."""
    return timedelta(seconds=value)


@pytest.mark.parametrize(
    ("policy", "start_to_close", "limit"),
    [
        (None, None, 3600.0),
        (None, seconds(60), 3806.6015625),  # 11 attempts of a minute, and the default policy's ten waits
        (RetryPolicy(seconds(1), 1, seconds(1), 1), seconds(7200), 7200.0),
        (RetryPolicy(seconds(1), 1, seconds(1), 1), seconds(60), 3600.0),
        (RetryPolicy(seconds(100), 4, seconds(300), 2), seconds(3600), 4 * 3600.0 + 100 + 200 + 300),
        (RetryPolicy(seconds(10), 1001, seconds(10), 1), seconds(1), 1001.0 + 10_000),
        (RetryPolicy(seconds(0), 11, seconds(0), 1), seconds(3600), 11 * 3600.0),
        (RetryPolicy(seconds(1), 0, seconds(1), 1), seconds(1), math.inf),
    ],
)
def test_wait_limit(policy: RetryPolicy | None, start_to_close: timedelta | None, limit: float) -> None:
    """The limit of the wait is what the platform may take: N attempts and the waits between them, at least an hour."""
    assert lifecycle.wait_limit(policy, start_to_close) == pytest.approx(limit)


def test_wait_limit_of_a_billion_attempts() -> None:
    """A limit is never too short and is found at once, however many attempts there are."""
    policy = RetryPolicy(seconds(1), 10**9, seconds(100), 1.000_000_1)
    assert lifecycle.wait_limit(policy, None) >= 10**9
    assert lifecycle.wait_limit(dataclasses.replace(policy, maximum_attempts=10**400), None) >= 10**12


def test_steps_are_plain_data() -> None:
    """A step compares by what it says."""
    assert Sleep(1.0) == Sleep(1.0, None)
    step = next(lifecycle.look("a/b"))
    assert isinstance(step, Send)
    assert (step.call, step.timeout) == (Call("GET", "/actions/a%2Fb"), 30.0)
