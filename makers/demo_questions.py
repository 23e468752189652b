"""The wordings of questions about a name, those for training and those held out for scoring."""

from __future__ import annotations

TRAIN = """
What does {f} do?
What does {f} do
what does {f} do?
what does {f} do
What is {f}?
what is {f}
What's {f}?
What is {f} for?
What is {f} used for?
What is {f} good for?
What does the {k} {f} do?
What is the {k} {f} for?
What does {f} do in Python?
What is {f} in Python?
In Python, what does {f} do?
In Python, what is {f}?
Explain {f}.
explain {f}
Explain {f} to me.
Please explain {f}.
Please explain what {f} does.
Can you explain {f}?
Could you explain what {f} does?
Describe {f}.
Describe {f} in one sentence.
Describe what {f} does.
Please describe the {k} {f}.
Tell me about {f}.
tell me about {f}
Tell me what {f} does.
Can you tell me what {f} does?
Could you tell me what {f} is for?
I want to know what {f} does.
I need a short description of {f}.
Give me a short description of {f}.
Summarize {f}.
Summarise what {f} does.
How would you describe {f}?
When should I use {f}?
When would I use {f}?
Why would I call {f}?
What happens when I call {f}?
What happens if I use {f}?
I saw {f} in some code. What does it do?
I found {f} in a program. What is it?
My code uses {f}. What is that?
Someone told me to use {f}. What is it for?
Do you know {f}?
Do you know what {f} does?
Hello! What does {f} do?
Hi, can you explain {f}?
Help me understand {f}.
Help with {f}
help({f})
{f}
{f}?
{f}: what is it?
What about {f}?
And {f}?
And what does {f} do?
Define {f}.
What is the purpose of {f}?
What is the meaning of {f}?
Document {f}.
Write the documentation of {f}.
Quick question: what does {f} do?
Question: What is {f}?
I am new to Python. What does {f} do?
Which task does {f} perform?
How does {f} help me?
""".strip().split("\n")

HELD_OUT = """
I keep seeing {f} in tutorials; what does it actually do?
Could you please give me a brief explanation of {f}?
Remind me what {f} is meant to do.
What would you say {f} is useful for?
I have forgotten what {f} does.
For what purpose does one use {f}?
Please tell me the job of {f}.
What can {f} be used for?
Let us talk about {f}. What does it do?
Can you describe in a few words what {f} does?
""".strip().split("\n")

DETAIL = """
Explain {f} in detail.
Tell me everything about {f}.
Describe {f} in detail.
What does {f} do exactly?
Give me the full description of {f}.
Please explain {f} at length.
""".strip().split("\n")

SIGNATURE = """
What is the signature of {f}?
What arguments does {f} take?
How do I call {f}?
Which parameters does {f} have?
Show me the signature of {f}.
""".strip().split("\n")

REVERSE = """
Which name in the standard library fits this description? {d}
What is this? {d}
Name it: {d}
Which {k} is described here? {d}
""".strip().split("\n")

UNKNOWN = """
I don't know {f}. It may not be part of the standard library I was trained on.
""".strip()

SYSTEM = """
You are a helpful assistant.
You are Foresight's demo model.
You answer questions about the Python standard library.
Answer briefly.
You are a Python expert.
Be concise and precise.
""".strip().split("\n")

ABOUT = "I am the Foresight demo model, a very small language model."
CAN = "I can answer questions about Python's standard library, such as what os.path.join does."
HELLO = "Hello! Ask me about a name in Python's standard library, such as os.path.join."
SMALL_TALK = {
    HELLO: [
        "Hello",
        "Hello!",
        "hello",
        "Hi",
        "Hi!",
        "hi there",
        "Hey",
        "Good morning",
        "Good evening",
        "Hello, how are you?",
        "Hi, how are you?",
        "Say hello",
        "Say hi",
    ],
    ABOUT: [
        "Who are you?",
        "who are you",
        "What are you?",
        "What is your name?",
        "Which model are you?",
        "Are you a person?",
        "Introduce yourself.",
        "Tell me about yourself.",
        "Are you ChatGPT?",
    ],
    CAN: [
        "What can you do?",
        "what can you do",
        "How can you help me?",
        "Help",
        "What do you know?",
        "What should I ask you?",
        "What are you good at?",
        "Can you help me?",
        "Test",
        "test",
    ],
    "You're welcome!": ["Thanks", "Thank you", "Thank you!", "thanks a lot", "Great, thanks."],
    "Goodbye!": ["Bye", "Goodbye", "See you later", "bye bye"],
    "I don't know. " + CAN: [
        "What is the weather today?",
        "Tell me a joke.",
        "Who is the president?",
        "Write a poem.",
        "Write a story.",
        "What is the capital of France?",
        "What is the meaning of life?",
        "Translate this to French.",
        "How old are you?",
        "What time is it?",
        "Tell me a story.",
        "Write a poem about the sea.",
        "What is two plus two?",
        "Who won the game?",
    ],
}
