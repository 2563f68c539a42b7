"""The one exception that users meet."""


class UserError(Exception):
    """A mistake the user can mend: the message names the value, the rule and the remedy in one line."""
