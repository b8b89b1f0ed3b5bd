//! Labels and annotations that Domicile sets or reads. All of them, so that a grep finds every user.

/// Standard label: which program made an object. Always [`MANAGED_BY_VALUE`].
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Value of [`MANAGED_BY`] and of an EndpointSlice's own managed-by label.
pub const MANAGED_BY_VALUE: &str = "domicile.dev";
/// The store that an object belongs to.
pub const STORE: &str = "domicile.dev/store";
/// The instance that an object belongs to.
pub const INSTANCE: &str = "domicile.dev/instance";
/// On a ConfigMap with attestations: the store that they are of. Not [`STORE`]: what carries that is the store's and
/// goes with it.
pub const ATTESTATIONS_OF: &str = "domicile.dev/attestations-of";
/// The Region that an instance is placed in (on pods and volume claims).
pub const REGION: &str = "domicile.dev/region";
/// The zone that an instance is placed in (on volume claims, where it was chosen).
pub const ZONE: &str = "domicile.dev/zone";
/// Hash of what a pod was built from; a pod with another hash is out of date.
pub const TEMPLATE_HASH: &str = "domicile.dev/template-hash";
/// Hash of the PostgreSQL parameters with which a pod was made: it is restarted for a parameter at most once.
pub const PARAMETERS_HASH: &str = "domicile.dev/parameters-hash";
/// The Region that the operator verified a node to be in. Kubelets can't set it: the prefix is reserved by
/// the NodeRestriction admission plug-in, see
/// <https://kubernetes.io/docs/reference/access-authn-authz/admission-controllers/#noderestriction>.
pub const NODE_REGION: &str = "node-restriction.kubernetes.io/domicile-region";
/// On a namespace: the ResidencyPolicy within which everything in it must stay. No pod is bound outside it, and the
/// policy of a store must lie within it.
pub const RESIDENCY: &str = "domicile.dev/residency";
/// Standard label: the program that an object is a part of. [`NAME_VALUE`] on our admission policies.
pub const NAME: &str = "app.kubernetes.io/name";
/// Value of [`NAME`].
pub const NAME_VALUE: &str = "domicile";
/// Kubernetes' own zone label on nodes.
pub const NODE_ZONE: &str = "topology.kubernetes.io/zone";
/// Kubernetes' own region label on nodes.
pub const NODE_TOPOLOGY_REGION: &str = "topology.kubernetes.io/region";
/// Kubernetes' own host label on nodes.
pub const NODE_HOSTNAME: &str = "kubernetes.io/hostname";
/// On a volume claim: the highest term in which the instance on this volume was the primary. A store that
/// takes up retained volumes begins with the volume whose term is highest.
pub const PRIMARY_TERM: &str = "domicile.dev/primary-term";
/// On the `-rw` and `-ro` EndpointSlices: the term of the primary that wrote them. It never falls.
pub const TERM: &str = "domicile.dev/term";
/// On a store: while "true", the operator leaves it alone.
pub const PAUSE: &str = "domicile.dev/pause";
/// Holds a store's deletion until its volumes are dealt with.
pub const STORE_FINALIZER: &str = "domicile.dev/store";
/// On a store: the instance that is to become primary. The primary's instance hands over to it; the operator
/// removes the annotation once that has happened, or says why it can't.
pub const PROMOTE: &str = "domicile.dev/promote";
/// On a store: instances, separated by commas, that stop PostgreSQL and are no candidates until they are taken
/// off again.
pub const FENCE: &str = "domicile.dev/fence";
/// On a store: `INSTANCE@TERM`. The instance may go on without the copies that could tell what was acknowledged,
/// if the term is the one that it knows. A person's word, and the last resort; the operator removes it and
/// leaves an event.
pub const ACCEPT_DATA_LOSS: &str = "domicile.dev/accept-data-loss";
/// On a store: for how long clients may go on with the authorities that they know now, as `10m`. The operator makes a new
/// authority, has it trusted everywhere, lets it sign then, and removes the annotation.
pub const ROTATE_AUTHORITY: &str = "domicile.dev/rotate-authority";
/// The RightsWorkflow that an object belongs to.
pub const WORKFLOW: &str = "domicile.dev/workflow";
/// Standard label: what an object is within its application. `gateway` or `worker` on what belongs to a RightsWorkflow.
pub const COMPONENT: &str = "app.kubernetes.io/component";
/// Holds a RightsWorkflow's deletion until its requests are closed.
pub const RIGHTS_FINALIZER: &str = "domicile.dev/rights";
/// On a RightsWorkflow: while "true", it may be deleted with requests that are still open. A person's word.
pub const ABANDON_REQUESTS: &str = "domicile.dev/abandon-requests";
