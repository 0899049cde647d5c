"""The command line."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from itertools import chain
from pathlib import Path
from typing import Callable, Optional, Union, get_args

from prometheus_client import generate_latest

from tscwatch import __version__, config, daemon, host, recording, show, web
from tscwatch.attribute import Attributor
from tscwatch.capture import SourceName, open_source
from tscwatch.errors import TscwatchError
from tscwatch.inventory import Inventory
from tscwatch.judge import Judge
from tscwatch.metrics import Metrics
from tscwatch.model import Event, Host
from tscwatch.pipeline import Pipeline

log = logging.getLogger("tscwatch")

_EXAMPLES = """\
examples:
  tscwatch run                          watch this host, serve metrics on port 9978
  tscwatch run --json | jq .phase       one JSON object a line
  tscwatch run --config /etc/tscwatch/tscwatch.yaml
  tscwatch record -o run.jsonl          keep what happens, to look at it elsewhere
  tscwatch replay run.jsonl             the same calls and mismatches, without root
  tscwatch replay run.jsonl --metrics   the metrics as they were at its end
"""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; gives the exit status (see :mod:`tscwatch.errors`)."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(format="tscwatch: %(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        arguments.command(arguments)
    except TscwatchError as error:
        log.error("%s", error)
        return error.exit_status
    except BrokenPipeError:
        # Who read our output has gone. Python would flush into the closed pipe once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
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
    here = host.read(Host())
    with ExitStack() as stack:
        stopped = stack.enter_context(daemon.stop_signals())
        metrics = Metrics(settings.max_vms)
        port = stack.enter_context(web.serving(metrics.registry(), settings.address, settings.port))
        source = stack.enter_context(closing(open_source(arguments.source or settings.source)))

        def tick() -> None:
            metrics.tell_health(source.info, source.health())

        tick()
        inventory, pipeline = Inventory(), _pipeline(settings)
        form = _form(arguments, settings)
        _take(daemon.found(source, inventory, here), pipeline, metrics, form)
        log.info("metrics: http://%s:%d/metrics", settings.address, port)
        _take(daemon.watch(source, inventory, here, stopped, tick), pipeline, metrics, form)


def _record(arguments: argparse.Namespace) -> None:
    settings = config.load(arguments.config)
    here = host.read(Host())
    with ExitStack() as stack:
        stopped = stack.enter_context(daemon.stop_signals())
        source = stack.enter_context(closing(open_source(arguments.source or settings.source)))
        writer = stack.enter_context(closing(recording.Writer(arguments.output)))
        log.info("recording to %s: end with Ctrl-C", arguments.output)
        inventory = Inventory()
        for event in chain(
            daemon.found(source, inventory, here),
            daemon.watch(source, inventory, here, stopped, lambda: None),
        ):
            writer.write(event)


def _replay(arguments: argparse.Namespace) -> None:
    settings = config.load(arguments.config)
    metrics = Metrics(settings.max_vms)
    form = None if arguments.metrics else _form(arguments, settings)
    _take(recording.read(arguments.recording), _pipeline(settings), metrics, form)
    if arguments.metrics:
        print(generate_latest(metrics.registry()).decode(), end="")


def _pipeline(settings: config.Config) -> Pipeline:
    return Pipeline(Attributor(settings.max_vms, settings.max_vcpus), Judge(settings.tolerance_ppm))


_Form = Callable[[show.Shown], str]


def _form(arguments: argparse.Namespace, settings: config.Config) -> _Form:
    return show.as_json if arguments.json or settings.log_format == "json" else show.as_text


def _take(
    events: Iterable[Union[Event, Host]],
    pipeline: Pipeline,
    metrics: Metrics,
    form: Optional[_Form],
) -> None:
    """Events all the way: to the metrics, and to standard output in a form if there is one."""
    for event in events:
        for item in pipeline.feed(event):
            metrics.tell(item)
            if form is not None and isinstance(item, get_args(show.Shown)):
                print(form(item), flush=True)
