"""The demo: real handwritten digits, watched from the first step to the advice."""
