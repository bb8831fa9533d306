"""A cluster's description measured on the machine itself: what its ranks take for the operations that a plan counts."""
