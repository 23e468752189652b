"""Carries out `StepPlan`s on a device: slots, KV pool, model, sampler. Decides nothing.

Data in: `StepPlan`. Data out: `StepResult`, through a `PendingStep` so that the next plan can be
launched before this result is read. What a running sequence needs between steps (tokens, lengths,
page tables, sampling parameters) lives in arrays by slot on the device.
"""
