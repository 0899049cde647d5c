"""The command line: parses arguments and calls what they name."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Optional, get_args

from prometheus_client import generate_latest

from tscwatch import __version__, config, doctor, explain, recording
from tscwatch.analysis.pipeline import Pipeline
from tscwatch.daemon import Daemon, record
from tscwatch.errors import RecordingError, TscwatchError
from tscwatch.model import KINDS, PHASES, SourceName
from tscwatch.publish import client, report, top
from tscwatch.publish.metrics import Metrics
from tscwatch.publish.publisher import Publisher, choose_log, no_log
from tscwatch.publish.state import State

log = logging.getLogger("tscwatch")

_INSTALLED_CONFIG = Path("/etc/tscwatch/tscwatch.yaml")

_EXAMPLES = """\
examples:
  tscwatch run                           observe this host, serve metrics on port 9978
  tscwatch run --json | jq .phase        one JSON object per line
  tscwatch run --config /etc/tscwatch/tscwatch.yaml
  tscwatch record -o run.jsonl           record events, to analyse them elsewhere
  tscwatch replay run.jsonl              the same calls and mismatches, without root
  tscwatch replay run.jsonl --metrics    the metrics at the end of the recording
  tscwatch report run.jsonl -o run.html  the recording as an HTML page
  tscwatch top                           the guests of the running daemon, live
  tscwatch doctor                        whether this host can be observed, and how well
  tscwatch explain                       the kinds of mismatches and the phases
  tscwatch explain vcpu_skew             what one of them means
"""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line and return its exit status (see :mod:`tscwatch.errors`)."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(format="tscwatch: %(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        return arguments.command(arguments) or 0
    except TscwatchError as error:
        log.error("%s", error)
        return error.exit_status
    except BrokenPipeError:
        # The reader of standard output has gone; at exit, Python would flush into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """Return the parser; the manual and the shells' completions are generated from it."""
    parser = argparse.ArgumentParser(
        prog="tscwatch",
        description="Shows when the TSCs of a KVM guest's vCPUs disagree.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tscwatch {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    run = commands.add_parser("run", help="observe this host and serve metrics")
    run.set_defaults(command=_run)
    _add_host_options(run)
    run.add_argument("--json", action="store_true", help="print one JSON object per line")
    run.add_argument(
        "--textfile",
        type=Path,
        metavar="FILE.prom",
        help="also write the metrics to a file, for node_exporter's textfile collector",
    )

    record = commands.add_parser("record", help="write this host's events to a file")
    record.set_defaults(command=_record)
    _add_host_options(record)
    record.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="the recording to write"
    )

    replay = commands.add_parser("replay", help="print what a recording contains; needs no root")
    replay.set_defaults(command=_replay)
    replay.add_argument("recording", type=Path, metavar="FILE", help="a recording")
    form = replay.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object per line")
    form.add_argument(
        "--metrics", action="store_true", help="print the metrics at the end of the recording"
    )
    _add_config(replay)

    report_ = commands.add_parser("report", help="write a recording as an HTML page")
    report_.set_defaults(command=_report)
    report_.add_argument("recording", type=Path, metavar="FILE", help="a recording")
    report_.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE.html", help="the page to write"
    )
    _add_config(report_)

    top_ = commands.add_parser("top", help="show the guests of the running daemon, live")
    top_.set_defaults(command=_top)
    daemon = top_.add_mutually_exclusive_group()
    daemon.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help=f"the daemon's configuration, with its address (default: {_INSTALLED_CONFIG})",
    )
    daemon.add_argument("--url", help="the daemon's address, if it is another")

    doctor_ = commands.add_parser(
        "doctor",
        help="check whether this host can be observed; exit status 0 (yes), 1 (partly), 2 (no)",
    )
    doctor_.set_defaults(command=_doctor)
    doctor_.add_argument("--json", action="store_true", help="print one JSON object per line")

    explain_ = commands.add_parser("explain", help="explain a kind of mismatch or a phase")
    explain_.set_defaults(command=_explain)
    explain_.add_argument(
        "topic",
        choices=tuple(explain.TOPICS),
        nargs="?",
        metavar="KIND|PHASE",
        help="without it, all of them are listed",
    )
    return parser


def _add_host_options(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--source",
        choices=get_args(SourceName),
        help="how calls are captured (default: the configuration's, else the best that works)",
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML configuration")


def _run(arguments: argparse.Namespace) -> None:
    Daemon(arguments.config, arguments.source, arguments.json, arguments.textfile).run()


def _record(arguments: argparse.Namespace) -> None:
    record(arguments.config, arguments.source, arguments.output)


def _replay(arguments: argparse.Namespace) -> None:
    settings = config.load(arguments.config)
    as_json = arguments.json or settings.log_format == "json"
    state, pipeline = State(settings.max_vms, settings.per_vcpu), _pipeline(settings)
    publisher = Publisher(state, no_log if arguments.metrics else choose_log(as_json))
    for event in recording.read(arguments.recording):
        publisher.publish(pipeline.feed(event))
    publisher.close()
    if arguments.metrics:
        print(generate_latest(Metrics(state).registry()).decode(), end="")


def _report(arguments: argparse.Namespace) -> None:
    pipeline = _pipeline(config.load(arguments.config))
    items = (item for event in recording.read(arguments.recording) for item in pipeline.feed(event))
    lines = list(report.page(arguments.recording.name, items))
    try:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise RecordingError(
            f"{arguments.output}: cannot be written ({error.strerror}): name another file with -o"
        ) from error


def _top(arguments: argparse.Namespace) -> None:
    if arguments.url:
        top.run(client.Client(arguments.url))
        return
    file = arguments.config
    with suppress(PermissionError):
        if file is None and _INSTALLED_CONFIG.exists():
            file = _INSTALLED_CONFIG
    top.run(client.from_config(config.load(file)))


def _pipeline(settings: config.Config) -> Pipeline:
    return Pipeline(settings.max_vms, settings.max_vcpus, settings.tolerance)


def _doctor(arguments: argparse.Namespace) -> int:
    logging.getLogger().setLevel(logging.ERROR)  # what the sources log is part of the report
    found = [*doctor.checks(), doctor.source()]
    for check in found:
        if arguments.json:
            print(json.dumps(check._asdict()))
        else:
            remedy = f" -> {check.remedy}" if check.remedy else ""
            print(f"{check.state:<8} {check.what:<14} {check.found}{remedy}")
    return doctor.STATUS[doctor.worst(found)]


def _explain(arguments: argparse.Namespace) -> None:
    if arguments.topic is None:
        _list_topics("kinds of mismatch", KINDS)
        _list_topics("phases", PHASES)
        return
    for title, text in zip(("what", "from", "do"), explain.TOPICS[arguments.topic]):
        print(textwrap.fill(text, initial_indent=f"{title:<6}", subsequent_indent=" " * 6))


def _list_topics(title: str, names: Sequence[str]) -> None:
    """Print each topic with the first sentence of its meaning."""
    print(f"{title}:")
    for name in names:
        sentence = explain.TOPICS[name].meaning.partition(". ")[0].rstrip(".")
        indents = f"  {name:<12}", " " * 14
        print(textwrap.fill(sentence, 80, initial_indent=indents[0], subsequent_indent=indents[1]))
