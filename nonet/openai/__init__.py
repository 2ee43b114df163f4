"""The wire schema: what clients send (`requests`) and what they get (`responses`), as OpenAI and vLLM define them.

Used by the server, and by what forwards to servers. Knows no engine and no HTTP.
"""
