"""The pure core: vocabulary, page accounting, prefix cache, policy.

Data in: `Request`s, aborts and `StepResult`s. Data out: `StepPlan`s and `Output`s.
Imports the standard library and numpy only: no torch, no asyncio, no clock, no I/O; time and
randomness are arguments. The same code serves the engine, the simulator and the planner.
"""
