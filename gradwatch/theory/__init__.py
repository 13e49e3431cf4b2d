"""Laws, bounds and constants from the literature, as pure functions of numbers.

Each module holds one subject, needs the standard library and numpy only, and says for every
formula where it comes from: a paper that was read, or a derivation made here and checked by
simulation. Nothing in this package looks at a model; monitors, bounds and rules call it.

    norm_preservation       activations and gradients of a fresh network
    gradient_convergence    how small the gradient gets; what steps, batch, dropout and width do
    lr_batch_ratio          the noise of SGD; the gradient noise scale; rescaling learning rates
    break_even              stability thresholds of optimizers; covariance of gradients
"""
