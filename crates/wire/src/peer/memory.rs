//! RAM on its way between two hosts: the page stream of mode A.
