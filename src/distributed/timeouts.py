"""Waiting times, in seconds, of processes that run together.

This file and `ranks.py` import no torch: `run.py` needs them before it knows whether there is anything to compute.
"""

# Clusters start processes minutes apart; a rank that never comes must still be reported.
ARRIVAL_SECONDS = 600.0
# When to say which processes are waited for.
NOTICE_SECONDS = 30.0
# A rank that fails breaks the collectives of the others: how long to wait for the one that knows the reason.
REASON_SECONDS = 5.0
# After a failure elsewhere, for a rank to finish by itself, which a blocked collective may prevent.
GRACE_SECONDS = 10.0
# How long rank 0 waits for the others to exit: after a failure they may be blocked until it does.
FAILURE_SECONDS = 3.0
EXIT_SECONDS = 30.0
POLL_SECONDS = 0.2
