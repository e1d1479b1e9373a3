"""Names of the TensorDict entries and the legend of shape letters.

Every docstring of this package uses the same letters:

====== ==========================================================
letter meaning
====== ==========================================================
``B``  batch
``T``  time steps of a slice
``H``  planning or imagination horizon
``E``  ensemble members (``n_models``)
``P``  particles per member
``M``  mixture modes of a member
``O``  observation dims
``A``  action dims (for one-hot actions, the number of actions)
``D``  latent state dims
``C``  context dims (may be 0)
``N``  envs, rows or candidates
``K``  a number whose meaning each docstring gives
``W``  width of a plan's step; in formulas the whitening matrix
``...`` any leading batch shape
====== ==========================================================

The constants below are the *default* names. Modules, losses and environments
accept other names the TorchRL way (``in_keys``, ``out_keys``, ``set_keys``).
"""

OBSERVATION = "observation"
ACTION = "action"
REWARD = "reward"
TERMINATED = "terminated"
TRUNCATED = "truncated"
DONE = "done"

LATENT = "latent"
CONTEXT = "context"
STATE_VALUE = "state_value"
STATE_ACTION_VALUE = "state_action_value"
VALUE_TARGET = "value_target"
BOOTSTRAP_VALUE = "bootstrap_value"
TERM_PROB = "term_prob"

ALIVE = "alive"
MEMBER = "member"
PARTICLE_REWARD = "particle_reward"
EPISTEMIC_VAR = "epistemic_var"
ALEATORIC_VAR = "aleatoric_var"
DISAGREEMENT = "disagreement"

MASK = ("collector", "mask")
TRAJ_IDS = ("collector", "traj_ids")
PLANNED = "planned"
INDEX = "index"
WEIGHT = "weight"
IS_INIT = "is_init"
STEPS_TO_NEXT = "steps_to_next_obs"

NEXT_OBSERVATION = ("next", OBSERVATION)
NEXT_LATENT = ("next", LATENT)
NEXT_REWARD = ("next", REWARD)
NEXT_TERMINATED = ("next", TERMINATED)
NEXT_TRUNCATED = ("next", TRUNCATED)
NEXT_DONE = ("next", DONE)
NEXT_TERM_PROB = ("next", TERM_PROB)
