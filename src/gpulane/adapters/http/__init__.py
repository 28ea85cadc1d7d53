"""Any HTTP server whose job paths the settings name: an LLM server, a speech model, a program of one's own.

Pure. What is not a job is relayed as it is; a job's body is passed unread, but for the `model` it names.
"""
