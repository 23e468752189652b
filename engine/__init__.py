"""One process per replica: the loop that joins the pure scheduler to a worker.

Data in: `messages.Submit | Abort | Drain` over a transport. Data out: `messages.Ready | Step |
Rejected | Dead`. The only package that knows both the scheduler and the worker. `client`,
`messages`, `transport` and `config` import neither torch nor the worker, because the API process
imports them.
"""
