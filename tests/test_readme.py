"""Every Python example in the README runs, against the local platform; its figures are those that were measured.

What the README claims about behaviour, and the tests that show it; one of the tests below looks whether they exist.

Promises:
  runs no action twice       test_faults.py::test_a_start_is_not_sent_again_after_what_may_have_started_it_or_never_will
                             test_faults.py::test_a_start_is_sent_again_after_what_cannot_have_started_it
  loses no running action    test_faults.py::test_a_poll_survives_whatever_may_pass
                             test_executor.py::test_collect_elsewhere
  one origin gets the token  test_http_client.py::test_redirects_are_not_followed
                             test_faults.py::test_a_reply_that_echoes_the_token_does_not_make_an_error_show_it
                             test_executor.py::test_no_frame_of_a_suspended_task_holds_the_token
  a reply is its request's   test_transport.py::test_a_poll_does_not_get_a_reply_that_came_too_early
                             test_transport.py::test_another_actions_reply_is_no_reply
Install:
  renamed or in a zip file   test_vendored.py::test_a_renamed_copy_and_an_installed_one_work_in_one_process
                             test_vendored.py::test_runs_from_inside_a_zip
  the layer and licence      test_layer.py::test_holds_the_package_and_its_licence
                             test_layer.py::test_two_checkouts_give_the_same_bytes
  the summary on an index    test_packaging.py::test_the_metadata_says_what_this_is_and_where_it_comes_from
This one or the official one:
  the same import and call   peers/test_official_sdk.py::test_the_same_call_makes_the_same_requests
                             peers/test_official_sdk.py::test_the_same_reply_gives_the_same_result
  execution_mode, log_action peers/test_official_sdk.py::test_the_signatures_are_the_same
  no policy given            peers/test_official_sdk.py::test_without_a_policy_the_official_sdk_sends_one_of_its_own
  RetryPolicy.default()      peers/test_official_sdk.py::test_the_retry_policies_are_the_same_but_for_the_default
  values of a RetryPolicy    test_models.py::test_policy_is_frozen
                             test_models.py::test_policy_refuses
  an action that failed      peers/test_official_sdk.py::test_a_failed_action_is_a_runtime_error
  Python 3.9 or later        test_packaging.py::test_wheel_runs_on_any_python_from_3_9_on_and_needs_nothing_else
Configuration:
  arguments win              test_models.py::test_arguments_come_first
                             test_models.py::test_missing_configuration
                             test_executor.py::test_missing_configuration_sends_nothing
API and errors:
  signatures and attributes  test_imports.py::test_a_public_class_has_these_members_and_no_others
                             test_imports.py::test_an_exception_has_these_bases_and_attributes
  errors can be pickled      test_errors.py::test_errors_survive
  positional HttpClientError test_errors.py::test_positional_arguments
  handles stay where they are test_executor.py::test_handles_stay_where_they_are
  a refused result           test_executor.py::test_a_refused_result_is_warned_of
  long params in a thread    test_payloads.py::test_the_loop_goes_on_while_params_are_encoded
  what params may hold       test_wire.py::test_params_arrive_as_the_json_that_people_expect
                             test_wire.py::test_what_json_cannot_hold_is_refused_with_its_place
                             peers/test_pydantic.py::test_models_are_found_wherever_they_stand
  return_type                test_executor.py::test_return_type_that_has_the_method
                             test_executor.py::test_other_return_types_leave_the_result
                             test_typing.py::test_inferred_types
  result(timeout)            test_executor.py::test_handle
                             test_executor.py::test_wait_that_is_over
  text of a peer             test_redaction.py::test_forms
                             test_redaction.py::test_one_line
                             test_lifecycle.py::test_what_a_peer_wrote_is_one_printable_line
Waiting:
  four tries in 60 s         test_faults.py::test_a_start_is_given_up_after_four_tries
                             test_lifecycle.py::test_start_gives_up_rather_than_wait_beyond_its_window
  intervals and lateness     test_poll_interval.py::test_intervals_grow_from_a_tenth_of_a_second_to_half_a_minute
                             test_poll_interval.py::test_lateness_and_polls
  Retry-After                test_lifecycle.py::test_retry_after_of_a_good_reply
                             test_lifecycle.py::test_retry_after_of_a_refused_poll
  given up after 5 minutes   test_lifecycle.py::test_a_poll_is_given_up_after_five_minutes
  404 within 10 s            test_lifecycle.py::test_not_found_just_after_the_start
  the limit of a wait        test_lifecycle.py::test_wait_limit
  cancelling                 test_executor.py::test_cancelled_execute_logs_the_id
  seen on stderr, and a note test_executor.py::test_by_default_a_person_sees_the_id
  unknown statuses           test_lifecycle.py::test_unknown_statuses_are_waited_for
                             test_lifecycle.py::test_unknown_status_that_ended
                             test_lifecycle.py::test_looking_at_an_unknown_status
  one Idempotency-Key        test_faults.py::test_a_start_is_sent_again_after_what_cannot_have_started_it
Command line:
  where the token comes from test_cli.py::test_the_token_comes_from_a_file_and_is_not_shown
                             test_cli.py::test_what_may_be_a_token_is_never_repeated
  -v, --port                 test_cli.py::test_verbose_shows_the_requests
                             test_cli.py::test_serve_listens_where_it_is_told
  no abbreviations           test_cli.py::test_an_unknown_option_is_named
  exit codes                 test_cli.py::test_a_failed_action_is_exit_code_1
                             test_cli.py::test_what_a_user_gets_wrong_is_exit_code_2_and_sends_nothing
                             test_cli.py::test_an_unknown_id_is_exit_code_3
                             test_cli.py::test_a_wait_that_is_over_is_exit_code_4
                             test_cli.py::test_ctrl_c_while_waiting_is_exit_code_130
                             test_cli.py::test_a_result_that_cannot_be_written_is_exit_code_2
                             test_cli.py::test_a_reader_that_has_gone_away_is_exit_code_141
Testing your code:
  fail_next and drop_next    test_local_platform.py::test_fail_next_answers_with_the_status_unprocessed
                             test_local_platform.py::test_drop_next_closes_without_an_answer
  tracebacks in the log      test_local_platform.py::test_the_traceback_of_a_failed_attempt_is_in_the_log
  requests                   test_local_platform.py::test_requests_are_recorded_in_order_without_the_token
  its token and its host     test_local_platform.py::test_a_wrong_token_is_refused
                             test_local_platform.py::test_a_request_for_another_host_is_421_and_runs_nothing
  a function defined again   test_local_platform.py::test_the_same_function_defined_again_takes_its_place
Network, logging, scaling:
  proxies                    peers/test_tinyproxy.py::test_https_goes_through_a_tunnel
                             peers/test_tinyproxy.py::test_no_proxy_goes_past_it
                             test_http_client.py::test_a_proxy_that_speaks_something_else_is_refused
                             test_transport.py::test_no_proxy_that_changes_between_requests_does_no_harm
  authorities                peers/test_certificates.py::test_ssl_cert_file_makes_a_private_ca_trusted
                             peers/test_certificates.py::test_ssl_cert_dir_makes_a_private_ca_trusted
                             test_transport.py::test_authorities_that_come_late_are_read
  TLS 1.2, always verified   peers/test_certificates.py::test_tls_1_1_is_not_spoken
                             peers/test_certificates.py::test_a_start_never_reaches_a_server_with_a_bad_certificate
  RFC 8305                   test_transport.py::test_dead_addresses_cost_a_moment
  advice                     peers/test_certificates.py::test_a_variable_that_names_nothing_is_blamed
                             test_http_client.py::test_a_busy_default_executor_is_named_as_the_cause
  gzip and deflate           test_transport.py::test_a_compressed_reply_is_read
  this machine by a proxy    test_transport.py::test_a_proxy_for_this_machine_is_warned_of
  64 connections, one line   test_http_client.py::test_event_loops_in_threads_share_64_sockets
                             test_http_client.py::test_event_loops_in_threads_wait_in_one_line
                             test_http_client.py::test_waiting_in_the_line_is_not_part_of_a_requests_time
  closed after 10 s          test_transport.py::test_idle_connections_close_by_themselves
  no thread waits            test_transport.py::test_a_stalled_reply_delays_nobody_else
                             test_transport.py::test_a_stalled_proxy_delays_nobody_else
                             test_transport.py::test_a_loop_that_watches_no_sockets_will_do
  tracing agents             peers/test_tracing.py::test_an_action_runs_under_a_tracing_agent
  nothing secret in the log  test_http_client.py::test_the_log_names_requests_and_nothing_secret
  warnings                   test_executor.py::test_long_retries_are_logged
                             test_executor.py::test_plain_http_is_warned_of
AWS Lambda:
  freezing; start and collect peers/test_lambda.py::test_three_invocations_with_a_freeze
                             peers/test_lambda.py::test_start_in_one_function_and_collect_in_another
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from zamp_sdk.local_platform import LocalPlatform

TESTS = Path(__file__).parent
README = (TESTS.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
PROGRAMS = [example for example in EXAMPLES if "import pytest" not in example]
TEST_MODULES = [example for example in EXAMPLES if "import pytest" in example]
MEASURED = re.compile(r"^<!-- `make bench` writes from here -->$(.*?)^<!-- to here -->$", re.DOTALL | re.MULTILINE)


def run(example: str) -> dict[str, Any]:
    """Run an example as a program, and return what it defines."""
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(example, "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("example", PROGRAMS, ids=range(len(PROGRAMS)))
def test_an_example_runs(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example runs, and its Lambda handlers answer."""
    platform = LocalPlatform()
    platform.action("send_invoice")(lambda params: params)

    @platform.action
    def charge_card(params: Any) -> Any:
        raise ValueError("expired")

    with platform:
        monkeypatch.setenv("ZAMP_BASE_URL", platform.base_url)
        monkeypatch.setenv("ZAMP_AUTH_TOKEN", platform.auth_token)
        names = run(example)
        event = {"invoice_id": "inv_123"}
        if "handler" in names:
            assert names["handler"](event, None) == event
        if "start_handler" in names:
            assert names["collect_handler"](names["start_handler"](event, None), None) == {"result": event}


@pytest.mark.parametrize("example", TEST_MODULES, ids=range(len(TEST_MODULES)))
def test_the_tests_among_the_examples_pass(example: str, tmp_path: Path) -> None:
    """The example's tests pass when pytest runs them, with warnings as errors and behind a proxy that is not there."""
    (tmp_path / "test_example.py").write_text(example, encoding="utf-8")
    options = ("-q", "-W", "error", "-p", "no:cacheprovider", "-o", "asyncio_default_fixture_loop_scope=function")

    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, tmp_path],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent), "HTTP_PROXY": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_the_readme_opens_with_the_two_commands_and_an_example() -> None:
    """The first screen shows how to try it, how to test it, and a program that uses it."""
    first_screen = "\n".join(README.splitlines()[:30])

    assert "python3 -m zamp_sdk demo" in first_screen
    assert "make test" in first_screen
    assert EXAMPLES[0] in first_screen
    assert len(PROGRAMS) >= 8
    assert len(TEST_MODULES) == 1


def test_the_figures_are_those_that_were_measured() -> None:
    """The README's figures are those at the head of what `make bench` wrote."""
    written = (TESTS / "benchmarks" / "README.md").read_text(encoding="utf-8")

    assert MEASURED.findall(README) == MEASURED.findall(written)
    assert len(MEASURED.findall(README)) == 1


def test_each_claim_has_a_test() -> None:
    """The tests that are named above exist."""
    assert __doc__ is not None
    named = re.findall(r"(\S+\.py)::(test_\w+)", __doc__)

    missing = [name for file, name in named if f"def {name}(" not in (TESTS / file).read_text(encoding="utf-8")]

    assert len(named) > 30
    assert missing == []


def test_the_messages_in_the_table_are_those_that_the_package_gives() -> None:
    """Each message that the table of troubles quotes stands in the package, so that people find it."""
    table = README.partition("| what you see |")[2].partition("\n\n")[0]
    quoted = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    texts = [
        node.value
        for module in (TESTS.parent / "zamp_sdk").rglob("*.py")
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]

    assert len(quoted) >= 10
    assert [message for message in quoted if not any(message in text for text in texts)] == []


def test_the_links_inside_the_readme_lead_somewhere() -> None:
    """Each link to a section names a heading."""
    headings = {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    }

    assert [link for link in re.findall(r"\]\(#([^)]+)\)", README) if link not in headings] == []
