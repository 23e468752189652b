"""The HTTP front end: OpenAI's API over one engine. Never imports torch.

Data in: JSON bodies. Data out: JSON or server-sent events. A request passes `body` (bytes to
object), `schema` and `parameters` (object to typed fields, or 400), `translate` (fields to a `Job`
of legal `Request`s), `admission`, the engine, `generation` (outputs to pieces of text) and a writer
of one of the two formats (`chat_format`, `completion_format`).
"""
