"""Data sets into shards: one module a data set; `synthetic` needs no raw data at all."""
