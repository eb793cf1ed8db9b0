"""Silo beside other Python job queues: `make compare`.

Read it from the inside out: `tally` is what every handler does, `peers` are the queues, `brokers` the servers
under them, `measurements` what is measured of a queue, `trial` is one measurement in a process of its own,
`comparison` all of them in turn, `report` and `plot` what is told of it.
"""
