//! Questions to the API server: whose is this token (TokenReview), and may they (SubjectAccessReview).
//!
//! Owns the calls and their bounds. Never: lets a stranger make it ask without end; worthless tokens are bounded per
//! address, and questions at a time in all. Or lets somebody wait for it who has just been known: a yes in use is renewed
//! while it is used.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use governor::{DefaultKeyedRateLimiter, Quota};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use kube::Client;
use kube::api::{Api, PostParams};
use tokio::sync::Semaphore;
use tracing::warn;

use super::memory::{Memory, Next, Verdict};
use super::{Caller, Verb};
use crate::api::GROUP;
use crate::rights::gateway::metrics::Metrics;
use crate::rights::gateway::problem::{Kind, Problem};

/// Both calls together.
const CALL: Duration = Duration::from_secs(3);
/// Questions at a time, of those who wait for the answer, and again of those by which a yes is renewed: strangers can't
/// keep these from being asked. More wait, within [`CALL`].
const AT_A_TIME: usize = 16;
/// Questions of one address: a second, and at once. A correct client needs one for each token and verb, and another when it
/// has been quiet; those by which a yes is renewed don't count.
const PER_SECOND: NonZeroU32 = NonZeroU32::MIN.saturating_add(19);
const AT_ONCE: NonZeroU32 = NonZeroU32::MIN.saturating_add(99);

/// The workflow that requests are filed with.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub workflow: String,
    /// Audiences of which a token must have one.
    pub audiences: Vec<String>,
}

/// Asks the API server, and remembers.
pub struct Tokens {
    server: Arc<Server>,
    memory: Memory,
    asked: DefaultKeyedRateLimiter<IpAddr>,
}

/// Asks the API server.
struct Server {
    client: Client,
    subject: Subject,
    room: Semaphore,
    renewals: Semaphore,
    metrics: Arc<Metrics>,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokens")
            .field("subject", &self.server.subject)
            .field("memory", &self.memory)
            .finish_non_exhaustive()
    }
}

impl Tokens {
    /// For a workflow.
    #[must_use]
    pub fn new(client: Client, subject: Subject, metrics: Arc<Metrics>) -> Self {
        let quota = Quota::per_second(PER_SECOND).allow_burst(AT_ONCE);
        Self {
            server: Arc::new(Server {
                client,
                subject,
                room: Semaphore::new(AT_A_TIME),
                renewals: Semaphore::new(AT_A_TIME),
                metrics,
            }),
            memory: Memory::default(),
            asked: DefaultKeyedRateLimiter::keyed(quota),
        }
    }

    /// Forgets addresses that haven't asked for a while. To be called now and then.
    pub fn tidy(&self) {
        self.asked.retain_recent();
    }

    /// Whose the token is, if they may.
    ///
    /// # Errors
    /// 401, 403, 503; 429 for an address with too many unknown tokens.
    pub async fn caller(&self, token: &str, verb: Verb, from: IpAddr) -> Result<Caller, Problem> {
        let shared = self.memory.slot(token, verb);
        let mut slot = shared.lock().await;
        let next = match slot.next(Instant::now()) {
            Next::Ask => {
                if self.asked.check_key(&neighbourhood(from)).is_err() {
                    return Err(Problem::passing(
                        Kind::RateLimited,
                        "too many tokens were shown from this address that aren't known yet; use one token until it is renewed",
                        Duration::from_secs(1),
                    ));
                }
                let asked = Instant::now();
                match self.server.ask(token, verb, &self.server.room).await {
                    Some(verdict) => {
                        slot.said(verdict.clone(), asked);
                        Next::Use(verdict)
                    }
                    None => slot.silent(asked, Instant::now()),
                }
            }
            Next::Renew(verdict) => {
                let (server, shared) = (self.server.clone(), shared.clone());
                let (token, asked) = (token.to_owned(), Instant::now());
                tokio::spawn(async move {
                    let said = server.ask(&token, verb, &server.renewals).await;
                    let mut slot = shared.lock().await;
                    match said {
                        Some(verdict) => slot.said(verdict, asked),
                        None => drop(slot.silent(asked, Instant::now())),
                    }
                });
                Next::Use(verdict)
            }
            known => known,
        };
        drop(slot);
        let subject = &self.server.subject;
        match next {
            Next::Use(Verdict::May(caller)) => Ok(caller),
            Next::Use(Verdict::MayNot) => Err(Problem::new(
                Kind::Forbidden,
                format!(
                    "this token's user may not {verb} requests of this workflow: they need a role with verb {verb} on rightsworkflows/requests of {GROUP}, name {}, in the namespace {}",
                    subject.workflow,
                    subject.namespace,
                    verb = verb.name(),
                ),
            )),
            Next::Use(Verdict::Unknown) => Err(Problem::new(
                Kind::Unauthenticated,
                format!(
                    "the API server doesn't know this token, or it has expired, or it isn't for the audience {}: get a new one for that audience",
                    subject.audiences.join(" or ")
                ),
            )),
            Next::Ask | Next::Renew(_) | Next::Fail => Err(Problem::passing(
                Kind::AuthenticationUnavailable,
                "the Kubernetes API server can't be asked whose this token is; the request was not looked at. Try again",
                Duration::from_secs(2),
            )),
        }
    }
}

impl Server {
    /// What the API server says now; none: it says nothing.
    async fn ask(&self, token: &str, verb: Verb, room: &Semaphore) -> Option<Verdict> {
        let said = tokio::time::timeout(CALL, self.review(token, verb, room)).await;
        match said.unwrap_or(Err("timeout")) {
            Ok(verdict) => {
                self.metrics.reviewed(match verdict {
                    Verdict::May(_) => "allowed",
                    Verdict::MayNot => "denied",
                    Verdict::Unknown => "unknown",
                });
                Some(verdict)
            }
            Err(why) => {
                self.metrics.reviewed("failed");
                // Nothing of the token is in it: the API server's words are left out.
                warn!("the API server can't say whose a token is: {why}");
                None
            }
        }
    }

    async fn review(
        &self,
        token: &str,
        verb: Verb,
        room: &Semaphore,
    ) -> Result<Verdict, &'static str> {
        let Ok(_permit) = room.acquire().await else {
            return Err("closing");
        };
        let Some(user) = self.whose(token).await? else {
            return Ok(Verdict::Unknown);
        };
        let Some(name) = user.username.clone().filter(|n| !n.is_empty()) else {
            return Ok(Verdict::Unknown);
        };
        Ok(if self.may(user, verb).await? {
            Verdict::May(Caller(format!("user/{name}").into()))
        } else {
            Verdict::MayNot
        })
    }

    async fn whose(&self, token: &str) -> Result<Option<UserInfo>, &'static str> {
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: token.to_owned(),
                audiences: Some(self.subject.audiences.clone()),
            },
            ..TokenReview::default()
        };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let status = api
            .create(&PostParams::default(), &review)
            .await
            .map_err(|e| kind_of(&e))?
            .status
            .unwrap_or_default();
        if status.authenticated != Some(true) {
            return Ok(None);
        }
        // An authenticator that doesn't know audiences leaves them empty, and then vouches for the API server's own.
        let ours = status
            .audiences
            .unwrap_or_default()
            .iter()
            .any(|a| self.subject.audiences.contains(a));
        Ok(status.user.filter(|_| ours))
    }

    async fn may(&self, user: UserInfo, verb: Verb) -> Result<bool, &'static str> {
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: user.username,
                uid: user.uid,
                groups: user.groups,
                extra: user
                    .extra
                    .map(|e| e.into_iter().collect::<BTreeMap<_, _>>()),
                resource_attributes: Some(ResourceAttributes {
                    namespace: Some(self.subject.namespace.clone()),
                    verb: Some(verb.name().to_owned()),
                    group: Some(GROUP.to_owned()),
                    version: Some("*".to_owned()),
                    resource: Some("rightsworkflows".to_owned()),
                    subresource: Some("requests".to_owned()),
                    name: Some(self.subject.workflow.clone()),
                    ..ResourceAttributes::default()
                }),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let api: Api<SubjectAccessReview> = Api::all(self.client.clone());
        let answer = api
            .create(&PostParams::default(), &review)
            .await
            .map_err(|e| kind_of(&e))?;
        let status = answer.status.unwrap_or_default();
        Ok(status.allowed && status.denied != Some(true))
    }
}

/// An error's kind. Its words may quote what was sent.
fn kind_of(e: &kube::Error) -> &'static str {
    match e {
        kube::Error::Api(s) if s.is_forbidden() => {
            "forbidden: the gateway's service account needs the ClusterRole domicile-rights-gateway, which the operator binds"
        }
        kube::Error::Api(_) => "it answered with an error",
        _ => "it can't be reached",
    }
}

/// Addresses that count as one: a host has a whole /64 of IPv6 to itself.
fn neighbourhood(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into(),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_host_counts_once() {
        let of = |a: &str| neighbourhood(a.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
    }
}
