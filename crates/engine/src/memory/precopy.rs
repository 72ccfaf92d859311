//! Rounds of pre-copy: what to send next, when to pause (capability 4).
