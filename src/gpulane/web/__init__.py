"""The front doors: ComfyUI's, A1111's, `http` services', the native API and the page. Knows no engine and
decides nothing.

Everything it needs from the running gateway comes through `ports`, handed in by `service`.
"""
