"""The command ``tco``: its options, and the comparison that they ask for.

Reads options into a workload and offers; prints nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..cache_rules import rules_for
from ..database import Database
from ..errors import ConfigError, InvalidInput, NotFound
from ..ledger.costs import LocalCosts
from ..provider import split_name
from ..types import Scope
from . import fitting
from .machine import completed, measured
from .offers import Machine, Offer, hosted, own
from .policies import NAMES
from .report import TcoReport
from .simulate import SAMPLE, simulate
from .workload import PRESETS, Workload

__all__ = ["OFFERS", "add_arguments", "run"]

#: What is compared where nothing is asked for: three hosts' price lists and this machine.
OFFERS = "openai:gpt-6.1-sol,anthropic:claude-sonnet-5-5,deepseek:deepseek-v4-flash,local"
#: Of a machine, in the setting ``costs``.
COSTS = ("watts", "kwh_price", "device_price", "device_years", "gb_month_price")
#: Fields of a workload that are not numbers of their own option.
APART = ("users", "embedded")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tco``."""
    parser.add_argument("--preset", choices=list(PRESETS), default="assistant", help="the workload to begin with")
    parser.add_argument("--users", type=int, metavar="N", help="how many users")
    parser.add_argument("--path", type=Path, metavar="DIR", help="read the workload from the ledger of this memory")
    for level in ("tenant", "user", "agent"):
        parser.add_argument(f"--{level}", help=f"with --path: only this {level}'s chats")
    parser.add_argument(
        "--offers",
        metavar="LIST",
        help=f'models with commas between: "vendor:model" by its price list, "local" measured here (default: {OFFERS}; '
        "with --path the models that it used)",
    )
    parser.add_argument("--policies", metavar="LIST", help=f"memory policies with commas between, of: {_listed()}")
    parser.add_argument("--sample", type=int, default=SAMPLE, metavar="N", help="users drawn (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample (default %(default)s)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table as CSV")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")
    work = parser.add_argument_group("workload", "numbers of the average user that differ from the preset or ledger")
    for name, field in Workload.model_fields.items():
        if name not in APART:
            kind: Any = int if field.annotation is int else float
            work.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", dest=f"work_{name}")
    here = parser.add_argument_group("machine", "what this machine costs; without, its CPU-seconds are told")
    for name in COSTS:
        here.add_argument(f"--{name.replace('_', '-')}", type=float, metavar="N", dest=f"cost_{name}")
    here.add_argument(
        "--machine",
        metavar="LIST",
        help='CPU-seconds instead of measuring: "prefill_s=0.002,cached_s=0.0001,decode_s=0.04,cores=2"',
    )


def run(args: argparse.Namespace) -> TcoReport:
    """The comparison; its CSV file and page are written where asked for.

    Raises `ConfigError` for a model without a price, `InvalidInput` for a workload or policy that is none, `NotFound`
    for a ledger without chats and `StoreError` where a file can't be read or written.
    """
    changes = {name: getattr(args, f"work_{name}") for name in Workload.model_fields if name not in APART}
    changes = {name: value for name, value in {**changes, "users": args.users}.items() if value is not None}
    costs = {name: getattr(args, f"cost_{name}") for name in COSTS}
    costs = {name: value for name, value in costs.items() if value is not None}
    machine = None if args.machine is None else _machine(args.machine)
    policies = NAMES if args.policies is None else _names(args.policies)
    if args.path is None:
        if args.tenant or args.user or args.agent:
            raise InvalidInput("--tenant, --user and --agent choose among the chats of a memory: give --path too")
        workload, notes = Workload.of(args.preset, **changes), [f"The workload is the preset {args.preset!r}."]
        offers = [_offer(name, machine, costs, None) for name in _split(args.offers or OFFERS)]
    else:
        if not (args.path / "memory.db").is_file():
            raise NotFound(f"there is no memory in {str(args.path)!r}")
        database = Database(args.path / "memory.db")
        try:
            scope = Scope(tenant=args.tenant, user=args.user, agent=args.agent)
            workload, notes = fitting.from_ledger(database, scope, **changes)
            wanted = _split(args.offers) if args.offers else fitting.models(database)
            offers = [_offer(name, machine, costs, database) for name in wanted]
        finally:
            database.close()
    report = simulate(workload, offers, policies, args.seed, sample=args.sample, notes=notes)
    if args.csv is not None:
        report.csv(args.csv)
    if args.html is not None:
        report.html(args.html)
    return report


def _offer(name: str, machine: Machine | None, costs: Mapping[str, float], database: Database | None) -> Offer:
    rules = rules_for(name)
    if split_name(name)[0] != "local" and (rules is None or rules.priced):
        # Memories lie on a disk of one's own, wherever the model is.
        disk = {name: price for name, price in costs.items() if name == "gb_month_price"}
        return replace(hosted(name), local=LocalCosts.of(disk))
    found = machine
    if found is None and database is not None:
        found = fitting.machine_of(database, name)
        found = found and completed(found, name)
    if found is None:
        found = measured(name)
    return own(name, found, costs)


def _machine(text: str) -> Machine:
    """The machine of ``name=number,...``."""
    known = ("prefill_s", "cached_s", "decode_s", "write_s", "before_s", "cores", "page_tokens", "token_bytes",
             "context_tokens", "learn_s", "lora_s", "lora_bytes", "gate_fails")  # fmt: skip
    numbers: dict[str, Any] = {}
    for part in _split(text):
        name, _, value = part.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if name not in known or not 0 <= number < float("inf"):
            raise ConfigError(f"--machine: {part!r} is none of {', '.join(known)} with a number of 0 or more")
        numbers[name] = int(number) if name in ("page_tokens", "context_tokens") else number
    missing = [name for name in ("prefill_s", "cached_s", "decode_s") if not numbers.get(name)]
    if missing:
        raise ConfigError(f"--machine: give {', '.join(missing)} too, above 0")
    return Machine(**numbers, source={"computing": "given"})


def _names(text: str) -> list[str]:
    """Policies by name; a name may have a comma in it."""
    left, found = text.strip(), list[str]()
    while left:
        name = next((name for name in NAMES if left == name or left.startswith(f"{name},")), None)
        if name is None:
            raise InvalidInput(f"--policies: {left!r} begins with no policy; there are: {_listed()}")
        found.append(name)
        left = left[len(name) :].lstrip(", ")
    return found


def _listed() -> str:
    return ", ".join(repr(name) for name in NAMES)


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
