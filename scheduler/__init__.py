"""The pure core: vocabulary, page accounting, prefix cache, policy.

Data in: `Request`s, aborts and `StepResult`s. Data out: `StepPlan`s and `Output`s.
Imports the standard library and numpy only: no torch, no asyncio, no clock, no I/O; time and
randomness are arguments. The same code serves the engine, the simulator and the planner.

    request, plan        what crosses to the server and to the worker
    scheduler            the story: add, abort, plan, settle
    decide, policy, gap  what the next step should be, without changing anything; rows makes it so
    admission            who may join: lengths guesses how long answers get, forecast adds them up
    gate, wait           who may queue, by the wait that is predicted; backlog sums the queue up
    sequence             one number line per choice; choices makes them, waiting queues them in
                         turns that fair_share gives to tenants
    memory               slots and pages: pages counts references, prefix names contents, and
                         host_tier keeps the pages of the paused
    speculation          how much is drafted: controller decides by acceptance, calibration,
                         draft_cost and verify_cost
    step_cost            what a step takes: profile is the measured table, fit the model of it
    counts               counters since start
    simulate, outcome    the same scheduler against a trace (trace, workloads) in virtual time;
                         simulated_drafts says which drafts come true
    capacity             how many replicas a trace needs
"""
