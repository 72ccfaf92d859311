//! Which role may call which method.
