"""Files of other people's data sets, read strictly: bounded, nothing executed, each fault a named `DataError`."""
