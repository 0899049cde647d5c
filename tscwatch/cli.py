"""The command line."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from itertools import chain
from pathlib import Path
from typing import Callable, Optional, get_args

from prometheus_client import generate_latest

from tscwatch import __version__, config, daemon, doctor, explain, recording
from tscwatch.analysis.attribute import Attributor
from tscwatch.analysis.judge import Judge
from tscwatch.analysis.pipeline import Pipeline
from tscwatch.capture.choice import open_source
from tscwatch.clock import now_ns
from tscwatch.errors import ConfigError, RecordingError, TscwatchError
from tscwatch.host import tsc
from tscwatch.host.inventory import Inventory
from tscwatch.linux import syscall
from tscwatch.model import Host, Item, SourceName
from tscwatch.publish import format, report, systemd, top, web, web_config
from tscwatch.publish.metrics import Metrics

log = logging.getLogger("tscwatch")

_EXAMPLES = """\
examples:
  tscwatch run                          watch this host, serve metrics on port 9978
  tscwatch run --json | jq .phase       one JSON object a line
  tscwatch run --config /etc/tscwatch/tscwatch.yaml
  tscwatch record -o run.jsonl          keep what happens, to look at it elsewhere
  tscwatch replay run.jsonl             the same calls and mismatches, without root
  tscwatch replay run.jsonl --metrics   the metrics as they were at its end
  tscwatch report run.jsonl -o run.html the same as a page to look at
  tscwatch top                          the guests of the running daemon, live
  tscwatch doctor                       can this host be observed, and how well
  tscwatch explain vcpu_skew            what a mismatch or a phase means
"""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; gives the exit status (see :mod:`tscwatch.errors`)."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(format="tscwatch: %(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        return arguments.command(arguments) or 0
    except TscwatchError as error:
        log.error("%s", error)
        return error.exit_status
    except BrokenPipeError:
        # Who read our output has gone. Python would flush into the closed pipe once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """What the command line takes; the manual and the shells' completions are made of it."""
    parser = argparse.ArgumentParser(
        prog="tscwatch",
        description="Watches how fast each guest's TSC is told to tick on this KVM host.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tscwatch {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    run = commands.add_parser("run", help="watch this host and serve its metrics")
    run.set_defaults(command=_run)
    _add_host_options(run)
    run.add_argument("--json", action="store_true", help="print JSON objects, one a line")
    run.add_argument(
        "--textfile",
        type=Path,
        metavar="FILE.prom",
        help="write the metrics there too, for node_exporter's textfile collector",
    )

    record = commands.add_parser("record", help="write what happens on this host to a file")
    record.set_defaults(command=_record)
    _add_host_options(record)
    record.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")

    replay = commands.add_parser("replay", help="show a recording; needs no root")
    replay.set_defaults(command=_replay)
    replay.add_argument("recording", type=Path, metavar="FILE")
    form = replay.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON objects, one a line")
    form.add_argument("--metrics", action="store_true", help="print the metrics at its end")
    _add_config(replay)

    report_ = commands.add_parser("report", help="a recording as one page of HTML")
    report_.set_defaults(command=_report)
    report_.add_argument("recording", type=Path, metavar="FILE")
    report_.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.html")
    _add_config(report_)

    top_ = commands.add_parser("top", help="the guests that the running tscwatch knows, live")
    top_.set_defaults(command=lambda arguments: top.run(arguments.url))
    top_.add_argument(
        "--url",
        default=f"http://{config.Config().address}:{config.Config().port}",
        help="where it listens (default: %(default)s)",
    )

    doctor_ = commands.add_parser(
        "doctor",
        help="whether this host can be observed; exit status 0 (well), 1 (a warning), 2 (not)",
    )
    doctor_.set_defaults(command=_doctor)
    doctor_.add_argument("--json", action="store_true", help="print JSON objects, one a line")

    explain_ = commands.add_parser("explain", help="what a mismatch or a phase means")
    explain_.set_defaults(command=_explain)
    explain_.add_argument("topic", choices=tuple(explain.TOPICS), metavar="KIND|PHASE")
    return parser


def _add_host_options(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--source",
        choices=get_args(SourceName),
        help="where calls are seen (default: the configuration's, else the best that works)",
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML configuration")


def _run(arguments: argparse.Namespace) -> None:
    settings = config.load(arguments.config)
    write = _writer(arguments, settings)
    here = tsc.read(Host())
    with ExitStack() as stack:
        wishes = stack.enter_context(daemon.signals(may_reload=True))
        metrics, pulse = Metrics(settings.max_vms), web.Heartbeat()
        registry = metrics.registry()
        answer = web.application(registry, pulse, metrics.vms)
        guard = web_config.load_web_config(settings.web_config)
        port = stack.enter_context(
            web.serving(answer, guard, settings.address, settings.port, _drop_all_capabilities)
        )
        textfile = arguments.textfile and web.Textfile(arguments.textfile, registry)
        source = stack.enter_context(closing(open_source(arguments.source or settings.source)))
        syscall.drop_capabilities_except((*syscall.INSPECT_PROCESSES, *source.capabilities))
        inventory, pipeline = Inventory(), _pipeline(settings)

        def tell(items: Iterable[Item]) -> None:
            _tell(items, metrics, write)

        def tick() -> None:
            health = source.health()
            metrics.tell_health(source.info, health)
            pulse.ready = all(health.probes.values())

        def each_second() -> None:
            nonlocal settings, write
            if wishes.reload:
                wishes.reload = False
                systemd.reloading()
                settings = _reload(arguments.config, settings, metrics)
                write = _writer(arguments, settings)
                limits = settings.max_vms, settings.max_vcpus
                tell(pipeline.configure(now_ns(), *limits, settings.tolerance_ppm))
                systemd.ready(metrics.summary())
            pulse.beat()
            systemd.alive(metrics.summary())
            if textfile:
                textfile.write()

        tick()
        for event in daemon.found(source, inventory, here):
            tell(pipeline.feed(event))
        scheme = "http" if guard.cert_file is None else "https"
        log.info("metrics: %s://%s:%d/metrics", scheme, settings.address, port)
        systemd.ready(metrics.summary())
        stack.callback(systemd.stopping)
        for event in daemon.watch(source, inventory, here, wishes, tick, each_second):
            tell(pipeline.feed(event))


def _drop_all_capabilities() -> None:
    syscall.drop_capabilities_except(())


def _reload(path: Optional[Path], before: config.Config, metrics: Metrics) -> config.Config:
    """The configuration from now on: as read, or the one before where that cannot be used."""
    try:
        settings = config.load(path)
    except ConfigError as error:
        log.error("%s: the configuration from before stays in force", error)
        metrics.tell_reload(False)
        return before
    metrics.tell_reload(True)
    fixed = ("source", "address", "port", "web_config")
    if any(getattr(settings, name) != getattr(before, name) for name in fixed):
        log.warning("source and listen are as before until a restart")
    log.info("the configuration was read again")
    return settings


def _record(arguments: argparse.Namespace) -> None:
    settings = config.load(arguments.config)
    here = tsc.read(Host())
    with ExitStack() as stack:
        wishes = stack.enter_context(daemon.signals(may_reload=False))
        source = stack.enter_context(closing(open_source(arguments.source or settings.source)))
        writer = stack.enter_context(closing(recording.Writer(arguments.output)))
        syscall.drop_capabilities_except((*syscall.INSPECT_PROCESSES, *source.capabilities))
        log.info("recording to %s: end with Ctrl-C", arguments.output)
        inventory = Inventory()
        for event in chain(
            daemon.found(source, inventory, here),
            daemon.watch(source, inventory, here, wishes, lambda: None, lambda: None),
        ):
            writer.write(event)


def _replay(arguments: argparse.Namespace) -> None:
    settings = config.load(arguments.config)
    pipeline, metrics = _pipeline(settings), Metrics(settings.max_vms)
    write = _silent if arguments.metrics else _writer(arguments, settings)
    for event in recording.read(arguments.recording):
        _tell(pipeline.feed(event), metrics, write)
    if arguments.metrics:
        print(generate_latest(metrics.registry()).decode(), end="")


def _pipeline(settings: config.Config) -> Pipeline:
    return Pipeline(Attributor(settings.max_vms, settings.max_vcpus), Judge(settings.tolerance_ppm))


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


def _doctor(arguments: argparse.Namespace) -> int:
    logging.getLogger().setLevel(logging.ERROR)  # what the sources say stands in the report
    found = [*doctor.checks(), doctor.source()]
    for check in found:
        if arguments.json:
            print(json.dumps(check._asdict()))
        else:
            remedy = f" -> {check.remedy}" if check.remedy else ""
            print(f"{check.state:<8} {check.what:<14} {check.found}{remedy}")
    return doctor.STATUS[doctor.worst(found)]


def _explain(arguments: argparse.Namespace) -> None:
    for title, text in zip(("what", "from", "do"), explain.TOPICS[arguments.topic]):
        print(textwrap.fill(text, initial_indent=f"{title:<6}", subsequent_indent=" " * 6))


def _tell(items: Iterable[Item], metrics: Metrics, write: Callable[[format.LogItem], None]) -> None:
    for item in items:
        metrics.tell(item)
        if isinstance(item, get_args(format.LogItem)):
            write(item)


def _silent(_item: format.LogItem) -> None:
    """Where something else than what happens is printed."""


def _writer(
    arguments: argparse.Namespace, settings: config.Config
) -> Callable[[format.LogItem], None]:
    """Lines on standard output, or entries with fields where that is the journal."""
    if arguments.json or settings.log_format == "json":
        return lambda item: print(format.as_json(item), flush=True)
    if systemd.is_standard_output():
        return systemd.send
    return lambda item: print(format.as_text(item), flush=True)
