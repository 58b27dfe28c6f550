"""`ropeway cost`: machines by the hour against tokens by the piece."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ropeway.cli.common import Json
from ropeway.cli.keys import Data, folder_of
from ropeway.errors import ConfigError

if TYPE_CHECKING:
    from ropeway.accounts import Prices
    from ropeway.accounts.cost import Report, Scenario

_DAY = 86_400
_WHEN = {"streaming": "at once", "batch": "within a day", "hybrid": "at once or within a day"}


def register(app: typer.Typer) -> None:
    app.command()(cost)


@dataclass(frozen=True)
class _Measured:
    """What the data directory tells of the last days: tokens a day over so many days, the share that was written, and
    the pace of the best hour with its busy seconds."""

    tokens_per_day: float
    written: float
    days: float
    pace: tuple[float, float] | None


def cost(
    tokens_per_day: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens read and written in a day (default: as measured).")
    ] = None,
    written: Annotated[
        float | None, typer.Option(help="The share of them that is written (default: measured).")
    ] = None,
    hour_price: Annotated[
        float | None, typer.Option(help="What a machine costs in an hour (default: machine in --prices).")
    ] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(help="What it computes with a full batch (default: the best measured hour).")
    ] = None,
    per_token_price: Annotated[
        str | None,
        typer.Option(
            metavar="IN/OUT", help="A provider's price for a million tokens (default: the model's in --prices)."
        ),
    ] = None,
    peak: Annotated[float, typer.Option(help="The busiest moment of people who wait, over the mean.")] = 3.0,
    waiting: Annotated[float, typer.Option(help="The share of tokens that people wait for, under hybrid.")] = 0.3,
    batch_discount: Annotated[float, typer.Option(help="What the provider takes off for work that may wait.")] = 0.5,
    once: Annotated[float, typer.Option(help="What the change to a machine costs once.")] = 0.0,
    model: Annotated[str | None, typer.Option(help="Count only this model's usage, and take its price.")] = None,
    days: Annotated[int, typer.Option(help="How far back to measure.", min=1, max=3650)] = 30,
    prices: Annotated[Path | None, typer.Option(metavar="FILE", help="The server's --prices.")] = None,
    data_dir: Data = None,
    as_json: Json = False,
) -> None:
    """Compare what a day's tokens cost at a provider and on machines of one's own.

    All streamed, all as batches, and mixed. What is not given is taken from what the server in --data-dir has measured.
    Every assumption is shown.
    """
    from ropeway.accounts.cost import Assumptions, report
    from ropeway.accounts.prices import Prices, read_prices

    known = read_prices(prices) if prices is not None else Prices()
    measured = None if tokens_per_day and tokens_per_second else _measure(data_dir, model, days)
    origins: dict[str, str] = {}

    def take(name: str, given: Any, found: Any, where: str, option: str) -> Any:
        if given is None and found is None:
            raise ConfigError(f"{name} is not known, and was not measured. Give {option}.", param=option)
        origins[name] = "given" if given is not None else where
        return given if given is not None else found

    window = f"measured over {measured.days:.1f} days" if measured else ""
    pace = measured.pace if measured else None
    best = f"measured in the best hour, {pace[1] / 60:.0f} busy minutes" if pace else ""
    bought = _prices(per_token_price, known, model)
    assumptions = Assumptions(
        tokens_per_day=take(
            "tokens_per_day", _number(tokens_per_day), measured and measured.tokens_per_day, window, "--tokens-per-day"
        ),
        written=take("written", written, measured.written if measured else 0.25, window or "assumed", "--written"),
        hour_price=take("hour_price", hour_price, known.machine, "from --prices", "--hour-price"),
        pace=take("pace", tokens_per_second, pace and pace[0], best, "--tokens-per-second"),
        input_price=take("input_price", bought and bought[0], None, "", "--per-token-price"),
        output_price=take("output_price", bought and bought[1], None, "", "--per-token-price"),
        peak=peak,
        waiting=waiting,
        batch_discount=batch_discount,
        once=once,
    )
    made = report(assumptions)
    typer.echo(_as_json(made, known.currency) if as_json else as_text(made, known.currency, origins))


def as_text(made: Report, currency: str, origins: dict[str, str]) -> str:
    """The report for people."""
    given = made.given
    shown = (
        ("tokens a day", f"{given.tokens_per_day:,.0f}", origins.get("tokens_per_day")),
        ("of them written", f"{given.written:.0%}", origins.get("written")),
        ("a machine's hour", f"{given.hour_price:,.2f} {currency}", origins.get("hour_price")),
        ("a machine's pace", f"{given.pace:,.0f} tokens/s", origins.get("pace")),
        ("a provider's price", f"{given.input_price:g}/{given.output_price:g} {currency} per million in/out", None),
        ("its discount for batches", f"{given.batch_discount:.0%}", None),
        ("busiest moment over mean", f"{given.peak:g}", None),
        ("hybrid: people wait for", f"{given.waiting:.0%} of the tokens", None),
        ("the change costs once", f"{given.once:,.2f} {currency}", None),
        ("a month", "30 days; machines that people wait on run all day, others by the hour", None),
    )
    lines = ["Assumptions (each has an option)"]
    lines += [f"  {name:26}{value}{f' ({origin})' if origin else ''}" for name, value, origin in shown]
    head = f"{'where':10}{'way':11}{'answers come':26}{'machines':>9}{currency + '/day':>13}{currency + '/month':>14}"
    lines += ["", f"{head}{'per million':>13}{'saving':>9}{'payback':>12}"]
    lines += [_line(made, one) for one in made.scenarios]
    best, reference = made.cheapest, made.reference
    saved = reference.per_month - best.per_month
    lines += [
        "",
        f"Cheapest: {best.where}, {best.way}. Against streaming everything from the provider it saves {saved:,.2f} "
        f"{currency} a month of {reference.per_month:,.2f}, {made.saving(best):.0%}.",
    ]
    if made.even is not None:
        most = given.pace * _DAY
        able = "more than" if made.even > most else f"{made.even / most:.0%} of"
        lines.append(
            f"A machine that always runs pays from {made.even:,.0f} tokens a day on, {able} what it can compute."
        )
    return "\n".join(lines)


def _line(made: Report, one: Scenario) -> str:
    days = made.payback_days(one)
    payback = "never" if days is None else f"{days:,.1f} days"
    machines = str(one.machines) if one.machines else "-"
    numbers = f"{machines:>9}{one.per_day:>13,.2f}{one.per_month:>14,.2f}{one.per_million:>13,.4f}"
    return f"{one.where:10}{one.way:11}{_WHEN[one.way]:26}{numbers}{made.saving(one):>9.0%}{payback:>12}"


def _as_json(made: Report, currency: str) -> str:
    import json
    from dataclasses import asdict

    scenarios = [
        {
            **asdict(one),
            "per_month": one.per_month,
            "saving": made.saving(one),
            "payback_days": made.payback_days(one),
        }
        for one in made.scenarios
    ]
    whole = {"currency": currency, "assumptions": asdict(made.given), "scenarios": scenarios}
    return json.dumps({**whole, "even_tokens_per_day": made.even}, indent=2)


def _number(text: str | None) -> float | None:
    """With k, m and b for thousands, millions and billions."""
    if text is None:
        return None
    scale = {"k": 1e3, "m": 1e6, "b": 1e9}.get(text[-1:].lower(), 1.0)
    try:
        return float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        message = f"--tokens-per-day is {text!r}; it must be a number such as 1000000 or 1m."
        raise ConfigError(message, param="--tokens-per-day") from None


def _prices(text: str | None, known: Prices, model: str | None) -> tuple[float, float] | None:
    """For a million tokens that are read, and that are written. Raises ConfigError."""
    if text is None:
        price = known.of(model or "")
        if price is None and model is None and len(known.models) == 1:
            [price] = known.models.values()
        return None if price is None else (price.input, price.output)
    first, _, second = text.partition("/")
    try:
        return float(first), float(second or first)
    except ValueError:
        message = f"--per-token-price is {text!r}; it must be one price or two, such as 0.50/1.50."
        raise ConfigError(message, param="--per-token-price") from None


def _measure(data_dir: str | None, model: str | None, days: int) -> _Measured | None:
    """None if nothing was counted in the last `days`."""
    from contextlib import closing

    from ropeway.accounts.accounts import FILE, open_accounts
    from ropeway.accounts.usage import HOUR, Query, ask, best_pace, first_hour

    folder, now = folder_of(data_dir), time.time()
    if not (folder / FILE).exists():
        return None
    since = int(now) - days * _DAY
    with closing(open_accounts(folder)) as store:
        rows = store.read_now(lambda connection: ask(connection, Query(by=(), model=model, since=since)))
        begun = store.read_now(lambda connection: first_hour(connection, since, model))
        pace = store.read_now(lambda connection: best_pace(connection, since, model))
    if not rows or begun is None:
        return None
    span = max(now - begun * HOUR, HOUR) / _DAY
    total = rows[0].total_tokens
    return _Measured(total / span, rows[0].completion_tokens / total, span, pace)
