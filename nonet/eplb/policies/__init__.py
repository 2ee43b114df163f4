"""Planning policies, one file each: the name in the configuration is the name of the file ("default" means nonet).

A policy is `place(problem: nonet.eplb.plan.Problem) -> expert_LG`, int32 [L, G], and raises ConfigError for a problem
that it cannot solve. Files that open with an underscore are parts that policies share.
"""
