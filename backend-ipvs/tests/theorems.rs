//! What the pure half promises, over random clusters and histories. What its objects do to packets is
//! compared with the packet model by `tests/conformance.rs` of the root package, in every mode.
#![allow(clippy::unwrap_used, reason = "any failure fails the test")]

use proptest::{collection::vec, prelude::*};
use proxier_backend_ipvs::{Config, Ipvs};
use proxier_core::testing::{generate, laws};

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 256, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn any_history_ends_where_a_fresh_start_would(
        env in generate::node(),
        history in vec(generate::burst(), 1..16),
        faults in prop_oneof![Just(Vec::new()), generate::faults()],
    ) {
        let backend = || Ipvs::new(Config::default()).unwrap();
        let refused = laws::any_history_ends_where_a_fresh_start_would(
            backend, env, &history, &faults, 24, laws::everything,
        );
        prop_assert_eq!(refused, []);
    }
}
