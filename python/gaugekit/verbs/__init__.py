"""What a user asks for, a module a verb: the two wings of the house meet here."""
