"""Operators: schema, composition of torch operators, fake, autograd and public function, one file a stem."""
