"""Errors: the kind that ends the command with one sentence and exit code 2."""


class UserError(Exception):
  """An option, a file or this Python is not as it has to be; the message says how."""
