"""Our services as processes of the cluster: plain classes plus the threads that drive them. `actors/` says where they
run.

One module each, which loads what that service needs and no more: a service that died is back the sooner, and takes less
from the training beside it.
"""
