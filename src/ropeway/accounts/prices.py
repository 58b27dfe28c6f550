"""What tokens of each model cost, and the machine."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from ropeway.accounts.account import NANO
from ropeway.config.yaml_file import read_yaml
from ropeway.errors import ConfigError

_MILLION = 10**6
ANY = "*"
"""The model name whose price holds for all that have none of their own."""


class Price(Struct, frozen=True, forbid_unknown_fields=True):
    """Units of the currency for a million tokens: read, read from the prefix cache (None: like any other), written."""

    input: float = 0.0
    output: float = 0.0
    cached: float | None = None

    def cost(self, prompt: int, cached: int, answer: int) -> int:
        """Billionths of a unit for `prompt` tokens, of which `cached` were cached, and `answer` tokens."""
        again = self.input if self.cached is None else self.cached
        rates = [round(rate * NANO) for rate in (self.input, again, self.output)]
        total = rates[0] * (prompt - cached) + rates[1] * cached + rates[2] * answer
        return (total + _MILLION // 2) // _MILLION


class Prices(Struct, frozen=True, forbid_unknown_fields=True):
    """Prices by model name, or '*'. `machine` is what this machine costs in an hour."""

    models: dict[str, Price] = {}
    currency: str = "USD"
    machine: float | None = None

    def of(self, model: str) -> Price | None:
        return self.models.get(model) or self.models.get(ANY)

    def cost(self, model: str, prompt: int, cached: int, answer: int) -> int | None:
        """Billionths of a unit; None if the model has no price."""
        price = self.of(model)
        return price.cost(prompt, cached, answer) if price is not None else None


def read_prices(path: Path) -> Prices:
    """The prices of a YAML file. Raises ConfigError."""
    data = read_yaml(path, "The file of prices", "--prices")
    try:
        found = msgspec.convert(data or {}, Prices)
    except msgspec.ValidationError as error:
        message = f"The file of prices {path} is not as it should be: {error}. See docs/cost.md for its shape."
        raise ConfigError(message, param="prices") from None
    numbers = [("machine", found.machine)]
    for model, price in found.models.items():
        numbers += [(f"{model}.{name}", getattr(price, name)) for name in ("input", "output", "cached")]
    for name, value in numbers:
        if value is not None and not 0 <= value < 1e6:  # also refuses NaN
            raise ConfigError(f"The price {name} in {path} is {value:g}; it must be 0 or more.", param="prices")
    return found
