"""Both dialects: the words of vLLM's command line and of TensorRT-LLM's YAML, and what they mean here.

    words      the one table from their words to our settings
    arguments  takes the flags it knows out of a command line
    files      takes the keys out of a YAML file
    meaning    what all that was said comes to: one configuration, and where each value came from

Used by the command line; knows no model and no machine: what a value becomes there is `config.resolve`'s business.
"""

from nonet.config.dialects.arguments import split_arguments
from nonet.config.dialects.meaning import Given, read_arguments, read_said
from nonet.config.dialects.words import WORDS, Said, Word, flags

__all__ = ["WORDS", "Given", "Said", "Word", "flags", "read_arguments", "read_said", "split_arguments"]
