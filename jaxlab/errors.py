"""Errors that a user can mend: one line that names the culprit and the remedy.

Scripts print the message alone and exit with `exit_code`; anything else is a
defect of jaxlab and keeps its traceback.
"""


class UserError(Exception):
    """The run cannot go on, for a reason that the user can see and mend."""

    exit_code = 1


class ConfigError(UserError):
    """The command line or the configuration is wrong; nothing was started."""

    exit_code = 2
