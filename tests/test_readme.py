"""What the documents show runs: each Python example, and each command; their links lead somewhere.

All of them run against a local platform. Commands that need the package index are run by peers/test_install.py.

What README and docs claim about behaviour, and the tests that show it; one of the tests below looks whether they exist.

Promises:
  runs no action twice       test_faults.py::test_a_start_is_not_sent_again_after_what_may_have_started_it_or_never_will
                             test_faults.py::test_a_start_is_sent_again_after_what_cannot_have_started_it
  loses no running action    test_faults.py::test_a_poll_survives_whatever_may_pass
                             test_executor.py::test_collect_elsewhere
  one origin gets the token  test_sending.py::test_redirects_are_not_followed
                             test_faults.py::test_a_reply_that_echoes_the_token_does_not_make_an_error_show_it
                             test_executor.py::test_no_frame_of_a_suspended_task_holds_the_token
  a reply is its request's   test_connections.py::test_a_poll_does_not_get_a_reply_that_came_too_early
                             test_lifecycle.py::test_a_poll_that_names_another_action
Install:
  renamed or in a zip file   test_vendored.py::test_a_renamed_copy_and_an_installed_one_work_in_one_process
                             test_vendored.py::test_runs_from_inside_a_zip
  the layer and licence      test_layer.py::test_holds_the_package_and_its_licence
                             test_layer.py::test_two_checkouts_give_the_same_bytes
  over an official one       peers/test_install.py::test_it_replaces_an_installed_official_one
  a version of its own       test_packaging.py::test_the_version_is_one_that_the_official_sdk_never_has
  after a change of folder   test_loops_and_forks.py::test_a_program_may_change_its_directory_before_its_first_action
  an older Python            test_vendored.py::test_an_older_python_is_told_what_is_needed
This one or the official one:
  the same import and call   peers/test_official_sdk.py::test_the_same_call_makes_the_same_requests
                             peers/test_official_sdk.py::test_the_same_reply_gives_the_same_result
  execution_mode, log_action peers/test_official_sdk.py::test_the_signatures_are_the_same
  no policy given            peers/test_official_sdk.py::test_without_a_policy_the_official_sdk_sends_one_of_its_own
  RetryPolicy.default()      peers/test_official_sdk.py::test_the_retry_policies_are_the_same_but_for_the_default
  values of a RetryPolicy    test_models.py::test_policy_is_frozen
                             test_models.py::test_policy_refuses
  an action that failed      peers/test_official_sdk.py::test_a_failed_action_is_a_runtime_error
  a platform that limits     peers/test_official_sdk.py::test_a_429_ends_the_wait_of_the_official_sdk_only
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
  what params may hold       test_params.py::test_params_arrive_as_the_json_that_people_expect
                             test_params.py::test_what_json_cannot_hold_is_refused_with_its_place
                             peers/test_pydantic.py::test_models_are_found_wherever_they_stand
  return_type                test_executor.py::test_return_type_that_has_the_method
                             test_executor.py::test_other_return_types_leave_the_result
                             test_typing.py::test_inferred_types
  result(timeout)            test_executor.py::test_handle
                             test_executor.py::test_wait_that_is_over
                             test_executor.py::test_the_same_result_twice
  text of a peer             test_redaction.py::test_forms
                             test_redaction.py::test_one_line
                             test_lifecycle.py::test_what_a_peer_wrote_is_one_printable_line
Waiting:
  four tries in 60 s         test_faults.py::test_a_start_is_given_up_after_four_tries
                             test_lifecycle.py::test_a_start_that_does_not_get_through_is_tried_for_a_minute
  five minutes of refusals   test_lifecycle.py::test_a_refused_start_is_tried_for_five_minutes
                             test_lifecycle.py::test_the_five_minutes_of_a_start_count_from_its_first_refusal
  intervals and lateness     test_poll_interval.py::test_intervals_grow_from_a_tenth_of_a_second_to_half_a_minute
                             test_poll_interval.py::test_lateness_and_polls
  Retry-After                test_lifecycle.py::test_retry_after_of_a_good_reply
                             test_lifecycle.py::test_retry_after_of_a_failed_poll
  given up after 5 minutes   test_lifecycle.py::test_a_poll_is_given_up_after_five_minutes
  404 within 10 s            test_lifecycle.py::test_not_found_just_after_the_start
  the limit of a wait        test_lifecycle.py::test_wait_limit
  cancelling                 test_executor.py::test_cancelled_execute_logs_the_id
  seen on stderr, and a note test_executor.py::test_by_default_a_person_sees_the_id
  the line that collects     test_executor.py::test_the_line_that_collects_works
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
                             test_cli.py::test_a_result_that_cannot_be_written_is_exit_code_2
                             test_cli.py::test_a_reader_that_has_gone_away_is_exit_code_141
  130, 143 and 129           test_cli.py::test_a_signal_ends_the_wait_and_says_how_to_collect
  a second signal            test_cli.py::test_a_second_signal_ends_a_command_whose_threads_do_not_end
  ids that begin with a dash test_cli.py::test_the_command_that_collects_works_when_pasted
Testing your code (docs/testing.md, too):
  a failed attempt at worst  test_local_platform.py::test_nothing_an_action_does_ends_the_platform
  fail_next and drop_next    test_local_platform.py::test_fail_next_answers_with_the_status_unprocessed
                             test_local_platform.py::test_drop_next_closes_without_an_answer
                             test_local_platform.py::test_a_fault_can_be_aimed
  rate_limit                 test_local_platform.py::test_requests_over_the_rate_limit_are_429
  tracebacks in the log      test_local_platform.py::test_the_traceback_of_a_failed_attempt_is_in_the_log
  requests                   test_local_platform.py::test_requests_are_recorded_in_order_without_the_token
                             test_local_platform.py::test_the_newest_requests_are_kept
  clear                      test_local_platform.py::test_clear_forgets_what_a_test_has_left
  its token and its host     test_local_platform.py::test_a_wrong_token_is_refused
                             test_local_platform.py::test_a_request_for_another_host_is_421_and_runs_nothing
  a forked child             test_local_platform.py::test_a_forked_child_does_nothing_to_the_platform
  a function defined again   test_local_platform.py::test_the_same_function_defined_again_takes_its_place
  test tools of others       peers/test_test_tools.py::test_no_tool_leaves_a_trace
                             peers/test_test_tools.py::test_the_local_platform_works_beside
                             peers/test_test_tools.py::test_pytest_socket_lets_the_local_platform_through
                             peers/test_test_tools.py::test_pytest_httpserver_can_be_the_platform
  serve in a script          test_cli.py::test_serve_in_a_script
                             test_cli.py::test_serve_ends_well_when_it_is_asked_to
Scaling:
  64 and 256 connections     test_pool.py::test_room_follows_the_quickest_of_the_last_replies
                             test_pool.py::test_slow_replies_are_given_more_connections
                             test_pool.py::test_room_follows_the_quickest_of_the_last_replies
                             test_pool.py::test_connections_take_a_quarter_of_the_descriptors_at_most
                             test_pool.py::test_event_loops_in_threads_share_the_room
  first come, first served   test_pool.py::test_event_loops_in_threads_wait_in_one_line
                             test_pool.py::test_waiting_in_the_line_is_not_part_of_a_requests_time
  a platform that limits     test_limits.py::test_all_come_back_whatever_the_limit
                             test_pacing.py::test_first_come_first_served
                             test_pacing.py::test_nobody_goes_before_retry_after_is_over
                             test_pacing.py::test_each_platform_and_token_has_one_pace
                             test_pacing.py::test_simulated_platforms
  the two warnings           test_limits.py::test_people_are_told_when_a_limit_begins_and_when_it_has_ended
                             test_pacing.py::test_a_limit_is_forgotten_when_nobody_has_waited_for_a_minute
Network, threads and logging (docs/troubleshooting.md):
  proxies                    peers/test_tinyproxy.py::test_https_goes_through_a_tunnel
                             peers/test_tinyproxy.py::test_no_proxy_goes_past_it
                             test_routes.py::test_a_proxy_that_speaks_something_else_is_refused
                             test_routes.py::test_what_no_proxy_names_is_asked_straight
  read once                  test_routes.py::test_a_route_is_found_once_and_kept
  a proxy's credentials      test_routes.py::test_a_proxy_that_echoes_its_password_does_not_make_an_error_show_it
                             test_executor.py::test_what_a_proxy_echoes_shows_no_credentials
  this machine by a proxy    test_routes.py::test_a_proxy_for_this_machine_is_warned_of
  authorities                peers/test_certificates.py::test_ssl_cert_file_makes_a_private_ca_trusted
                             peers/test_certificates.py::test_ssl_cert_dir_makes_a_private_ca_trusted
                             test_tls.py::test_authorities_that_come_late_are_read
  TLS 1.2, always verified   peers/test_certificates.py::test_tls_1_1_is_not_spoken
                             peers/test_certificates.py::test_a_start_never_reaches_a_server_with_a_bad_certificate
  advice                     peers/test_certificates.py::test_a_variable_that_names_nothing_is_blamed
                             test_tls.py::test_a_certificate_that_breaks_rules_is_to_blame
                             test_tls.py::test_an_empty_variable_is_named
                             test_tls.py::test_a_machine_without_authorities_is_told
                             test_tls.py::test_a_key_log_that_cannot_be_written_is_named
                             test_tls.py::test_a_platform_that_wants_a_certificate_of_its_clients_is_told
                             test_reading.py::test_what_cannot_be_decompressed_is_named
                             test_replies.py::test_what_can_never_be_read_is_said_plainly
  RFC 8305                   test_dialing.py::test_dead_addresses_cost_a_moment
  xn-- hosts                 test_models.py::test_a_host_that_two_standards_read_differently_is_refused
  a dot at the end           test_tls.py::test_a_dot_that_ends_the_hosts_name_is_in_no_certificate
  gzip and deflate           test_reading.py::test_a_compressed_reply_is_read
  tracing agents             peers/test_tracing.py::test_an_action_runs_under_a_tracing_agent
  nothing secret in the log  test_exchange.py::test_the_log_names_requests_and_nothing_secret
  where the time went        test_exchange.py::test_the_log_says_how_far_a_request_came
  warnings                   test_executor.py::test_long_retries_are_logged
                             test_executor.py::test_what_many_meet_is_told_once
                             test_notices.py::test_what_many_meet_is_a_warning_once_in_a_minute
                             test_executor.py::test_plain_http_is_warned_of
  many share two warnings    test_executor.py::test_many_that_are_cancelled_at_once_are_told_in_two_lines
  no warning of a timeout    test_executor.py::test_a_timeout_is_no_accident
  closed after 10 s          test_pool.py::test_idle_connections_close_by_themselves
  no thread waits            test_hops.py::test_a_stalled_reply_delays_nobody_else
                             test_hops.py::test_a_stalled_proxy_delays_nobody_else
                             test_loops_and_forks.py::test_a_loop_that_watches_no_sockets_will_do
  no thread is free          test_hops.py::test_without_a_thread_an_action_goes_on
                             test_loops_and_forks.py::test_threads_that_wait_for_this_very_action_do_not_wait_for_ever
  the end of a program       test_loops_and_forks.py::test_an_action_outlives_the_main_thread
AWS Lambda:
  freezing; start and collect peers/test_lambda.py::test_three_invocations_with_a_freeze
                             peers/test_lambda.py::test_start_in_one_function_and_collect_in_another
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from zamp_sdk.local_platform import LocalPlatform

TESTS = Path(__file__).parent
ROOT = TESTS.parent
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), TESTS / "benchmarks" / "README.md"])
}
README = DOCUMENTS["README.md"]
TROUBLESHOOTING = DOCUMENTS["docs/troubleshooting.md"]
MEASURED = re.compile(r"^<!-- `make bench` writes from here -->$(.*?)^<!-- to here -->$", re.DOTALL | re.MULTILINE)


class Sample(NamedTuple):
    """A block of code in a document."""

    place: str
    text: str


def samples(language: str) -> list[Sample]:
    """Find the blocks of a language in all documents."""
    return [
        Sample(f"{name}:{document.count(chr(10), 0, block.start()) + 1}", block[1])
        for name, document in DOCUMENTS.items()
        for block in re.finditer(rf"^```{language}\n(.*?)^```$", document, re.DOTALL | re.MULTILINE)
    ]


def commands(sample: Sample) -> str:
    """Return the commands of a console block as a shell script."""
    lines = sample.text.splitlines()
    assert all(line.startswith("$ ") for line in lines), f"{sample.place} shows more than commands"
    return "\n".join(line[2:] for line in lines)


PROGRAMS = [sample for sample in samples("python") if "import pytest" not in sample.text]
TEST_MODULES = [sample for sample in samples("python") if "import pytest" in sample.text]
CONSOLE = samples("console")
INSTALLING = [sample for sample in CONSOLE if "pip install" in sample.text]
SCRIPTS = [sample for sample in CONSOLE if sample not in INSTALLING]

each_program = pytest.mark.parametrize("sample", PROGRAMS, ids=lambda sample: sample.place)
each_test_module = pytest.mark.parametrize("sample", TEST_MODULES, ids=lambda sample: sample.place)
each_script = pytest.mark.parametrize("sample", SCRIPTS, ids=lambda sample: sample.place)


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """An environment that names a platform with the actions of the samples, and has this Python on its PATH."""
    platform = LocalPlatform()
    platform.action("send_invoice")(lambda params: params)

    @platform.action
    def charge_card(params: Any) -> Any:
        raise ValueError("expired")

    with platform:
        yield {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "ZAMP_BASE_URL": platform.base_url,
            "ZAMP_AUTH_TOKEN": platform.auth_token,
            "no_proxy": "127.0.0.1",
        }


def check_out(destination: Path) -> Path:
    """Copy what a clone holds, but for the tests."""
    destination.mkdir()
    for name in [*DOCUMENTS, "LICENSE", "Makefile", "pyproject.toml"]:
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, destination / name)
    for folder in ("zamp_sdk", ".ci"):
        shutil.copytree(ROOT / folder, destination / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return destination


def run_script(script: str, checkout: Path, environment: Mapping[str, str], seconds: float) -> str:
    """Run commands as a person would type them, each of which must succeed, and return what they print."""
    shell = subprocess.Popen(
        ["sh", "-eu", "-c", script],
        cwd=checkout,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that what it leaves running can be ended with it
    )
    try:
        output, _ = shell.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(shell.pid, signal.SIGKILL)
        output, _ = shell.communicate()
        pytest.fail(f"it did not end within {seconds} s: {output}")
    assert shell.returncode == 0, output
    return output


@each_program
def test_an_example_runs(sample: Sample, environment: Mapping[str, str]) -> None:
    """The example runs as a program without a warning, and prints what it should."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", sample.text],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{'invoice_id': 'inv_123'}" or done.stdout.startswith("it ran and failed: FAILED ")


@each_test_module
def test_the_tests_among_the_examples_pass(sample: Sample, tmp_path: Path) -> None:
    """The example's tests pass when pytest runs them, with warnings as errors and behind a proxy that is not there."""
    (tmp_path / "test_example.py").write_text(sample.text, encoding="utf-8")
    options = ("-q", "-W", "error", "-p", "no:cacheprovider", "-o", "asyncio_default_fixture_loop_scope=function")

    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, tmp_path],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HTTP_PROXY": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{sample.text.count('def test_')} passed" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="the commands are a Unix shell's")
@pytest.mark.skipif(shutil.which("make") is None, reason="this machine has no make")
@each_script
def test_commands_can_be_typed_as_they_stand(sample: Sample, environment: dict[str, str], tmp_path: Path) -> None:
    """The commands succeed one after the other in a clone; make only says what it would do."""
    run_script(commands(sample), check_out(tmp_path / "clone"), {**environment, "MAKEFLAGS": "n"}, seconds=60)


def test_the_documents_have_samples_of_each_kind() -> None:
    """What the tests above run is found in the documents."""
    assert len(PROGRAMS) >= 4
    assert len(TEST_MODULES) >= 1
    assert len(SCRIPTS) >= 6
    assert len(INSTALLING) >= 1
    assert {name.partition(":")[0] for name, _ in [*PROGRAMS, *CONSOLE]} == {
        "README.md",
        "docs/troubleshooting.md",
    }


@pytest.mark.skipif(shutil.which("make") is None, reason="this machine has no make")
def test_each_target_of_make_that_is_named_exists() -> None:
    """Each target of the Makefile that a document names is there, and CONTRIBUTING names what `make help` lists."""
    named = {target for text in DOCUMENTS.values() for target in re.findall(r"`make ([a-z-]+)", text)}
    listed = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))

    assert named <= listed
    assert {"check", "test", "test-peers", "test-all", "fuzz", "soak", "bench", "layer"} <= named


def test_the_readme_opens_with_what_a_newcomer_needs() -> None:
    """The first lines say what it is, when not to use it, and show how to try it and the first program."""
    opening = "\n".join(README.splitlines()[:55])

    places = [
        opening.index(each)
        for each in (
            "nothing but the standard library",
            "When not to use it",
            "python3 -m zamp_sdk demo",
            "make test",
            "python3-venv",
            "https://api.zamp.ai",
            PROGRAMS[0].text,
        )
    ]
    assert places == sorted(places)


def test_the_figures_are_those_that_were_measured() -> None:
    """README's figures are those at the head of what `make bench` wrote, and no other document has any."""
    assert [name for name, text in DOCUMENTS.items() if MEASURED.search(text)] == [
        "README.md",
        "tests/benchmarks/README.md",
    ]
    (all_of_them,) = MEASURED.findall(DOCUMENTS["tests/benchmarks/README.md"])
    assert all_of_them.endswith(MEASURED.findall(README)[0])
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
    table = TROUBLESHOOTING.partition("| what you see |")[2].partition("\n\n")[0]
    quoted = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    texts = [
        node.value
        for module in (ROOT / "zamp_sdk").rglob("*.py")
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]

    assert len(quoted) >= 10
    assert [message for message in quoted if not any(message in text for text in texts)] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_inside_the_repository_lead_somewhere(name: str) -> None:
    """Each link of a document to another file, or to a section, names one that is there."""
    lost = []
    for link in re.findall(r"\]\(([^)]+)\)", DOCUMENTS[name]):
        path, _, section = link.partition("#")
        if link.startswith("https://"):
            continue
        target = (ROOT / name).parent / path if path else ROOT / name
        if not target.exists() or (section and section not in sections(target)):
            lost.append(link)

    assert lost == []


def sections(document: Path) -> set[str]:
    """Return how links name the sections of a document."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_the_architecture_names_every_module() -> None:
    """The drawing of the modules has those that there are, and no others."""
    drawing = DOCUMENTS["docs/architecture.md"].partition("```text\n")[2].partition("```")[0]
    folders: list[str] = []
    drawn = set()
    for line in drawing.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [name] if name.endswith("/") else []
        if name.endswith(".py"):
            drawn.add("".join([*folders, name]))
    # The folders of the two halves are drawn by what they hold.
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "zamp_sdk").rglob("*.py")}

    assert drawn == modules - {"zamp_sdk/action_executor/__init__.py"}
