"""The commands of ``python -m agentmem``: consolidate, worker, jobs, report, explain, verify, tco.

Knows arguments, output and exit codes (0 done, 1 failed or not sound, 2 asked wrongly); the work is that of the verbs
of the same names. The only module that writes to standard output.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from . import config, consolidate, explaining, flows, reporting
from .background import Background
from .engine import Engine
from .errors import AgentMemError, ConfigError, InvalidInput, NotFound, ScopeError
from .flow import local, run
from .jobs import Jobs
from .opening import opened
from .planner.values import Outcome, amount
from .types import LEVELS, Scope

if TYPE_CHECKING:
    from .planner.values import ConsolidationPlan

__all__ = ["main"]

#: Seconds of silence after which a worker consolidates where nobody says otherwise.
IDLE_S = 30.0
#: Seconds between two looks whether a signal came.
SIGNAL_S = 0.2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors of agentmem are one line on standard error."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = _parser(given).parse_args(given)
    logging.basicConfig(level=logging.WARNING, format="agentmem: %(message)s", stream=sys.stderr)
    try:
        code: int = args.run(args)
        return code
    except AgentMemError as error:
        sys.stderr.write(f"agentmem: {type(error).__name__}: {error}\n")
        return 2 if isinstance(error, ConfigError | InvalidInput | ScopeError | NotFound) else 1
    except BrokenPipeError:  # `| head`: nobody reads on
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        sys.stderr.write("agentmem: interrupted; what was begun is taken up by the next run\n")
        return 130


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    where = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    where.add_argument("--path", help="the memory folder (default: that of the settings, ./memory)")
    where.add_argument("--model", help="the model, as 'scheme:name'")
    where.add_argument("--config", help="a TOML file with settings")
    whose = argparse.ArgumentParser(add_help=False)
    for level in LEVELS:
        whose.add_argument(f"--{level}", help=f"only what belongs to this {level}")
    parser = argparse.ArgumentParser(
        prog="agentmem", description="Memory for AI agents: one folder, three kinds of memory.", parents=[where]
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, work: Callable[[argparse.Namespace], int], text: str, parents: Sequence[argparse.ArgumentParser]
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, parents=parents)
        made.set_defaults(run=work)
        return made

    one = command("consolidate", _consolidate, "move memories between the kinds where that pays, now", [where, whose])
    one.add_argument("--dry-run", action="store_true", help="print what would be done, with what it is to save")
    _budgeted(one)
    one = command(
        "worker", _worker, "consolidate a folder that other processes chat in, until SIGTERM or SIGINT", [where]
    )
    when = one.add_mutually_exclusive_group()
    when.add_argument("--once", action="store_true", help="do what is due and end")
    when.add_argument("--every", type=_positive, metavar="SECONDS", help="on a schedule")
    when.add_argument("--idle", type=_positive, metavar="SECONDS", help=f"after a silence (default: {IDLE_S:g})")
    one.add_argument("--nice", type=int, default=10, help="how far to step back behind other processes (default: 10)")
    _budgeted(one)
    one = command("jobs", _jobs, "moves under way, made and failed; pause and resume them", [where, whose])
    state = one.add_mutually_exclusive_group()
    state.add_argument("--pause", action="store_true", help="let no process consolidate this folder in the background")
    state.add_argument("--resume", action="store_true", help="take that back")
    one = command("report", _report, "what memory cost and saved", [where, whose])
    one.add_argument("--since", help="ISO date or time")
    one.add_argument("--until", help="ISO date or time")
    one.add_argument("--html", metavar="FILE", help="write it as a page, too")
    one = command(
        "explain", _explain, "where a record lives, why, what it cost and saved, what would move it", [where, whose]
    )
    one.add_argument("id", help="the record's id")
    command("verify", _verify, "check every record, vector, page, slot and LoRA version; 1 if one is damaged", [where])
    one = command("tco", _tco, "what a workload costs a month, by provider, machine and memory policy", [])
    if "tco" in argv:  # the others need nothing of it
        from .tco import options

        options.add_arguments(one)
        # What stands before the command is hidden by its own option of that name.
        before, _ = where.parse_known_args(argv[: argv.index("tco")])
        one.set_defaults(path=Path(before.path) if hasattr(before, "path") else None)
    return parser


# ---- commands ------------------------------------------------------------------------------------------------------


def _consolidate(args: argparse.Namespace) -> int:
    with _folder(args) as engine:
        _modelled(engine)
        flow = consolidate.consolidate(engine, _scope(args), dry_run=args.dry_run, budget=_budget(args))
        plan = run(flow)
        _say(str(plan))
        return 1 if any(outcome.state == "failed" for outcome in _made(plan)) else 0


def _made(plan: ConsolidationPlan) -> list[Outcome]:
    """What this call did, of all that the plan tells: it stands first."""
    return [] if plan.dry_run else list(plan.outcomes[: len(plan.moves)])


def _worker(args: argparse.Namespace) -> int:
    with _folder(args) as engine, _signals() as came:
        _modelled(engine)
        settings = engine.settings
        idle_s, every_s = args.idle, args.every
        if not args.once and idle_s is None and every_s is None:
            idle_s, every_s = settings.consolidate_idle, settings.consolidate_every
            idle_s = IDLE_S if idle_s is None and every_s is None else idle_s
        if args.nice > 0 and hasattr(os, "nice"):
            os.nice(args.nice)
        background = Background(engine, idle_s=idle_s, every_s=every_s, budget=_budget(args), told=_told)
        when = [] if idle_s is None else [f"after {idle_s:g} s of silence"]
        when += [] if every_s is None else [f"every {every_s:g} s"]
        _say(f"worker on {settings.path}: {' and '.join(when) or 'what is due now'}")
        failed: list[AgentMemError] = []
        if args.once:
            _until(came, background, lambda: _once(engine, background, failed))
        else:
            background.start()
            while not came:
                time.sleep(SIGNAL_S)
            background.close()
        if failed:
            raise failed[0]
        _say("worker stopped")
    return 0


def _once(engine: Engine, background: Background, failed: list[AgentMemError]) -> None:
    try:
        if consolidate.due(engine):
            _say(f"made {len(background.run().moves)} moves")
        else:
            _say("nothing is due")
    except AgentMemError as error:
        failed.append(error)


def _until(came: list[int], background: Background, work: Callable[[], None]) -> None:
    """Do the work in a thread, and tell it to give way when a signal comes."""
    thread = threading.Thread(target=work, name="agentmem-worker", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(SIGNAL_S)
        if came:
            background.close()


def _jobs(args: argparse.Namespace) -> int:
    with _folder(args) as engine:
        jobs = Jobs(engine.database, engine.clock)
        if args.pause:
            jobs.pause()
        elif args.resume:
            jobs.resume()
        _say("consolidation in the background is paused" if jobs.paused() else "consolidation is not paused")
        for outcome in consolidate.outcomes(engine, _scope(args)):
            _say(_line(outcome))
        others = engine.database.query(
            "SELECT kind, state, COUNT(*) AS jobs FROM jobs WHERE kind != 'move' GROUP BY 1, 2 ORDER BY 1, 2"
        )
        for row in others:
            _say(f"{row['jobs']} of kind {row['kind'].split(' ')[0]} {row['state']}")
    return 0


def _line(outcome: Outcome) -> str:
    move = outcome.move
    cost = amount(move.cost if outcome.cost is None else outcome.cost, move.unit)
    saved = (
        "" if outcome.saved is None else f", saved {amount(outcome.saved, move.unit)} in {outcome.requests} requests"
    )
    note = f" ({outcome.note})" if outcome.note else ""
    return f"{outcome.state:8} {_when(outcome.at)} {move.kind} {move.scope}: {cost}{saved}{note}"


def _report(args: argparse.Namespace) -> int:
    with _folder(args) as engine:
        found = reporting.report(engine, _scope(args), since=args.since, until=args.until)
        if args.html:
            found.html(args.html)
        _say(str(found))
    return 0


def _explain(args: argparse.Namespace) -> int:
    with _folder(args) as engine:
        _say(str(run(local(explaining.explain, engine, _scope(args), args.id))))
    return 0


def _verify(args: argparse.Namespace) -> int:
    with _folder(args) as engine:
        found = run(local(flows.verify, engine))
        _say(str(found))
        return 0 if found.ok else 1


def _tco(args: argparse.Namespace) -> int:
    from .tco import options

    found = options.run(args)
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(found)
    else:
        _say(str(found))
    return 0


# ---- arguments -----------------------------------------------------------------------------------------------------


def _budgeted(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget",
        type=_amount,
        action="append",
        metavar="NAME=AMOUNT",
        help="what it may spend: seconds=60, dollars=0.10, bytes=1e9; may be given several times",
    )


def _amount(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no budget: give seconds=60, dollars=0.10 or bytes=1e9") from None


def _positive(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give seconds above 0")
    return seconds


def _budget(args: argparse.Namespace) -> dict[str, float] | None:
    return dict(args.budget) if args.budget else None


def _scope(args: argparse.Namespace) -> Scope:
    return Scope(**{level: getattr(args, level) for level in LEVELS})


@contextlib.contextmanager
def _folder(args: argparse.Namespace) -> Generator[Engine]:
    """The folder that is there already, open; a command makes none. No thread of its own consolidates it."""
    named: dict[str, Any] = {name: getattr(args, name, None) for name in ("path", "model", "config")}
    path = Path(config.read(named["config"], path=named["path"]).path)
    if not (path / "memory.db").is_file():
        raise NotFound(f"there is no memory in {path}: name its folder with --path")
    engine = opened(embedder=None, clock=None, settings={}, **named)
    try:
        yield engine
    finally:
        engine.close()


def _modelled(engine: Engine) -> None:
    """Without the model that the folder's chats run on nothing can be planned, and nobody would be told."""
    if engine.provider is None:
        raise ConfigError("no model is named: give the one that the chats run on, with --model or in agentmem.toml")


@contextlib.contextmanager
def _signals() -> Generator[list[int]]:
    """The SIGTERM and SIGINT that came, as a list that grows; handlers are put back afterwards."""
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:  # no more than this: it runs amid anything
        came.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- output --------------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _told(plan: ConsolidationPlan) -> None:
    """One line for each move that a run of a worker made."""
    for outcome in _made(plan):
        _say(_line(outcome))


def _when(at: float) -> str:
    return dt.datetime.fromtimestamp(at, dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
