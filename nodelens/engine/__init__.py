"""One pass over the data: the dry run, the plan, the collectors, and the table of results."""
