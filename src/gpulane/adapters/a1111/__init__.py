"""All that is known of AUTOMATIC1111 and its relatives (Forge, SD.Next): bytes and JSON in, our nouns out.

Pure: nothing here talks to an engine. The facts come from recordings of a real server and from reading its
source; where a line looks odd, its comment names the trap.
"""
