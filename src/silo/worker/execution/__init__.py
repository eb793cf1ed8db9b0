"""How handlers run: on the event loop, in threads, or in processes of their own.

`execution_for` in `choice` makes the one that a worker is asked for. All keep the promises of `Execution`:

| | async | thread | process |
|---|---|---|---|
| handler | `async def` | `def` | `def`, importable |
| runs on | the event loop | a daemon thread | a child process |
| after a timeout | is cancelled | goes on, unheard | is ended |
| whose job is cancelled | sees it; may be cancelled | sees it | sees it; is ended |
| that crashes | ends the worker | ends the worker | costs its job |
"""
