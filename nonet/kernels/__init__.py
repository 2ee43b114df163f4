"""Single operations, each with the plain form that specifies it beside the form that is fast."""
