"""Who may ask, how much of it, and what that costs: keys, limits, usage, prices."""

from ropeway.accounts.account import Account, Limits
from ropeway.accounts.accounts import Accounts
from ropeway.accounts.meter import Meter
from ropeway.accounts.prices import Prices, read_prices

__all__ = ["Account", "Accounts", "Limits", "Meter", "Prices", "read_prices"]
