"""A model server to test against.

server.py      sends: the listening socket, paces, faults on the wire, records
dialects.py    which paths an engine has, and what it answers on each
chat.py        chat and text completions
messages.py    Anthropic's Messages API
responses.py   the Responses API
reading.py     embeddings, ranks, scores, tokens, decisions
media.py       sounds and pictures
usage.py       usage objects
errors.py      what goes wrong, as each engine words it
speaking.py    a text that depends on the prompt, and its tokens
thoughts.py    what of it is thought, and told apart
questions.py   what a request asks, and what an engine refuses
validation.py  what servers say of a body that they cannot read
memory.py      how prompts began, and responses that were made
scripts.py     frames, and what they are made of
behaviour.py   how the simulator is told to answer
"""
