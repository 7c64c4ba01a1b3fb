"""The version of what ``config.json`` says of compact forms: what we write, and the newest that we read."""

VERSION = 1
