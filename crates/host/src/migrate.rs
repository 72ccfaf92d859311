//! Carries out the handover that the engine decides.
