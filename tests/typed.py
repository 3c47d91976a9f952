"""What checks annotations at each call: as type checkers do, it takes an int for a float."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
