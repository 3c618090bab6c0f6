"""Errors: the one kind that ends the command with a sentence and exit code 2."""


class UserError(Exception):
  """Something outside the program is wrong: an option, a file, a directory.

  Its message is the whole sentence that the user reads.
  """
