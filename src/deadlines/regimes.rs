//! The regimes, as data: each clock with its citation, and what is uncertain about it.
//!
//! Owns what the laws say, as far as this program acts on it; `docs/deadlines.md` shows the same to people, and a test
//! holds the two together. Never: computes anything. It is not legal advice.

use super::calendar::CALIFORNIA_BUSINESS;
use super::rules::{
    Clock, Deletion, Extension, FirstDay, Kind, Period, Proof, Rules, Scope, Unit, Verification,
    Zones,
};
use crate::api::rights_workflow::Regime;

/// The rules of a regime.
#[must_use]
pub fn rules(regime: Regime) -> &'static Rules {
    match regime {
        Regime::UsCaCcpa => &US_CA_CCPA,
        Regime::UsCaDeleteAct => &US_CA_DELETE_ACT,
        Regime::EuGdpr => &EU_GDPR,
        Regime::UkGdpr => &UK_GDPR,
        Regime::UsVa => &US_VA,
        Regime::UsCo => &US_CO,
        Regime::BrLgpd => &BR_LGPD,
        Regime::KrPipa => &KR_PIPA,
    }
}

/// Every regime, in the order of their listing.
pub static ALL: [&Rules; 8] = [
    &US_CA_CCPA,
    &US_CA_DELETE_ACT,
    &EU_GDPR,
    &UK_GDPR,
    &US_VA,
    &US_CO,
    &BR_LGPD,
    &KR_PIPA,
];

const EVERY: &[Kind] = &[Kind::Deletion, Kind::Access, Kind::Correction, Kind::OptOut];

const fn after_receipt(amount: u16, unit: Unit) -> Period {
    Period {
        amount,
        unit,
        first: FirstDay::AfterReceipt,
    }
}

const fn from_receipt(amount: u16, unit: Unit) -> Period {
    Period {
        amount,
        unit,
        first: FirstDay::Receipt,
    }
}

const fn one_zone(name: &'static str) -> Zones {
    Zones {
        received_in: name,
        ends_in: name,
    }
}

static US_CA_CCPA: Rules = Rules {
    regime: Regime::UsCaCcpa,
    id: "us-ca-ccpa",
    title: "California Consumer Privacy Act",
    grants: EVERY,
    answer: Clock {
        period: from_receipt(45, Unit::CalendarDays),
        citation: "Civ. Code 1798.130(a)(2)(A); 11 CCR 7021(b)",
    },
    opt_out: Some(Clock {
        period: after_receipt(15, Unit::BusinessDays(&CALIFORNIA_BUSINESS)),
        citation: "11 CCR 7026(f), 7027(g)",
    }),
    acknowledge: Some(Clock {
        period: after_receipt(10, Unit::BusinessDays(&CALIFORNIA_BUSINESS)),
        citation: "11 CCR 7021(a)",
    }),
    extension: Some(Extension {
        in_all: from_receipt(90, Unit::CalendarDays),
        citation: "Civ. Code 1798.130(a)(2)(A); 11 CCR 7021(b)",
    }),
    proof: Proof {
        requests: Verification::Allowed,
        opt_out: Verification::Never,
        citation: "11 CCR 7060(b), 7062; time spent on it counts: 7021(b)",
    },
    deletion: Deletion {
        scope: Scope::FromThePerson,
        citation: "Civ. Code 1798.105(a); 11 CCR 7022(b)",
    },
    zones: one_zone("America/Los_Angeles"),
    counting: "11 CCR 7021(b): the 45 days begin on the day of the receipt; otherwise Civ. Code 10 and Gov. Code 6800: the first day is excluded",
    uncertain: Some(
        "Whether \"will begin on the day that the business receives the request\" counts that day as the first, against \
         Civ. Code 10, is not settled: it is counted, which is a day earlier. Business days are not defined in the \
         CCPA's regulations: a day is taken off only if the United States and California both keep it; Civ. Code 7 and \
         9, read by themselves, would count Saturdays, which are not counted here. The wording of 11 CCR 7022 in force \
         since 2026, the subsections of 7026 and 7027, and Civ. Code 10 were not read in the original.",
    ),
};

static US_CA_DELETE_ACT: Rules = Rules {
    regime: Regime::UsCaDeleteAct,
    id: "us-ca-delete-act",
    title: "California Delete Act (data brokers, DROP)",
    grants: &[Kind::Deletion, Kind::OptOut],
    answer: Clock {
        period: after_receipt(45, Unit::CalendarDays),
        citation: "Civ. Code 1798.99.86(c)",
    },
    opt_out: None,
    acknowledge: None,
    extension: None,
    proof: Proof {
        requests: Verification::Never,
        opt_out: Verification::Never,
        citation: "Civ. Code 1798.99.86(b), (c): the agency verifies; what can't be verified is an opt-out",
    },
    deletion: Deletion {
        scope: Scope::AboutThePersonForGood,
        citation: "Civ. Code 1798.99.86(c), (d)",
    },
    zones: one_zone("America/Los_Angeles"),
    counting: "Gov. Code 6800: the first day is excluded, the last included",
    uncertain: Some(
        "The receipt is taken to be the download from DROP. The duty to fetch the list at least every 45 days, and to \
         delete again in each of these cycles, has no clock here, since it belongs to no single request. 11 CCR \
         7613-7614 were not read in the original.",
    ),
};

static EU_GDPR: Rules = Rules {
    regime: Regime::EuGdpr,
    id: "eu-gdpr",
    title: "General Data Protection Regulation",
    grants: EVERY,
    answer: Clock {
        period: after_receipt(1, Unit::Months),
        citation: "Regulation (EU) 2016/679 Art. 12(3)",
    },
    opt_out: None,
    acknowledge: None,
    extension: Some(Extension {
        in_all: after_receipt(3, Unit::Months),
        citation: "Regulation (EU) 2016/679 Art. 12(3)",
    }),
    proof: Proof {
        requests: Verification::OnDoubt,
        opt_out: Verification::OnDoubt,
        citation: "Regulation (EU) 2016/679 Art. 12(6)",
    },
    deletion: Deletion {
        scope: Scope::AboutThePerson,
        citation: "Regulation (EU) 2016/679 Art. 17(1)",
    },
    // The outermost regions (Art. 349, 355 TFEU) included: a Union that reaches from the Caribbean to the Indian Ocean.
    zones: Zones {
        received_in: "America/Martinique",
        ends_in: "Indian/Reunion",
    },
    counting: "Regulation (EEC, Euratom) 1182/71 Art. 3(1), (2)(c): the day of the receipt is not counted; Case C-171/03 Toeters",
    uncertain: Some(
        "\"Without undue delay\" comes first and has no figure. The opt-out is the objection of Art. 21. Waiting for \
         proof of identity may stop the clock; here it doesn't.",
    ),
};

static UK_GDPR: Rules = Rules {
    regime: Regime::UkGdpr,
    id: "uk-gdpr",
    title: "UK General Data Protection Regulation",
    grants: EVERY,
    answer: Clock {
        period: from_receipt(1, Unit::Months),
        citation: "UK GDPR Art. 12(3), 12A (Data (Use and Access) Act 2025 s. 76)",
    },
    opt_out: None,
    acknowledge: None,
    extension: Some(Extension {
        in_all: from_receipt(3, Unit::Months),
        citation: "UK GDPR Art. 12A",
    }),
    proof: Proof {
        requests: Verification::OnDoubt,
        opt_out: Verification::OnDoubt,
        citation: "UK GDPR Art. 12(6)",
    },
    deletion: Deletion {
        scope: Scope::AboutThePerson,
        citation: "UK GDPR Art. 17(1)",
    },
    zones: one_zone("Europe/London"),
    counting: "UK GDPR Art. 12A: the month begins with the receipt",
    uncertain: Some(
        "The ICO counts to the same date of the next month (3 September to 3 October). Since 5 February 2026 the text \
         says \"beginning with\" the receipt, which can be read as counting that day: it is counted, which is a day \
         earlier. Art. 12A itself was not read, only the like words of s. 54 of the Data Protection Act 2018. Waiting for proof of \
         identity, a fee or what is asked back stops the clock by law; here it doesn't.",
    ),
};

static US_VA: Rules = Rules {
    regime: Regime::UsVa,
    id: "us-va",
    title: "Virginia Consumer Data Protection Act",
    grants: EVERY,
    answer: Clock {
        period: after_receipt(45, Unit::CalendarDays),
        citation: "Va. Code 59.1-577(B)(1)",
    },
    opt_out: None,
    acknowledge: None,
    extension: Some(Extension {
        in_all: after_receipt(90, Unit::CalendarDays),
        citation: "Va. Code 59.1-577(B)(1)",
    }),
    proof: Proof {
        requests: Verification::Allowed,
        opt_out: Verification::Allowed,
        citation: "Va. Code 59.1-577(A), (B)(4)",
    },
    deletion: Deletion {
        scope: Scope::AboutThePerson,
        citation: "Va. Code 59.1-577(A)(3)",
    },
    zones: one_zone("America/New_York"),
    counting: "Va. Code 1-210(A): the day of the receipt is not counted",
    uncertain: Some(
        "An appeal after a refusal has a clock of its own (60 days), which is not kept here. 59.1-577 was read in an \
         unofficial copy and its subsections B(1) and B(4) were not, nor was 1-210.",
    ),
};

static US_CO: Rules = Rules {
    regime: Regime::UsCo,
    id: "us-co",
    title: "Colorado Privacy Act",
    grants: EVERY,
    answer: Clock {
        period: after_receipt(45, Unit::CalendarDays),
        citation: "C.R.S. 6-1-1306(2)(a)",
    },
    opt_out: None,
    acknowledge: None,
    extension: Some(Extension {
        in_all: after_receipt(90, Unit::CalendarDays),
        citation: "C.R.S. 6-1-1306(2)(a)",
    }),
    proof: Proof {
        requests: Verification::Allowed,
        opt_out: Verification::OnDoubt,
        citation: "C.R.S. 6-1-1306(2)(d); 4 CCR 904-3 Rules 4.03(A)(1)(a), 4.08",
    },
    deletion: Deletion {
        scope: Scope::AboutThePerson,
        citation: "C.R.S. 6-1-1306(1)(d); 4 CCR 904-3 Rule 4.06",
    },
    zones: one_zone("America/Denver"),
    counting: "C.R.S. 2-4-108(1): the first day is excluded, the last included",
    uncertain: Some(
        "Opting out is due \"as soon as feasibly possible and without undue delay\" (Rule 4.03), which has no figure: the \
         45 days are the latest. An appeal after a refusal has a clock of its own, which is not kept here. Of the \
         statute, 6-1-1306(2) is known from secondary sources, and 2-4-108 was not read.",
    ),
};

static BR_LGPD: Rules = Rules {
    regime: Regime::BrLgpd,
    id: "br-lgpd",
    title: "Lei Geral de Proteção de Dados",
    grants: EVERY,
    answer: Clock {
        period: after_receipt(15, Unit::CalendarDays),
        citation: "Lei 13.709/2018 Art. 19(II)",
    },
    opt_out: None,
    acknowledge: None,
    extension: None,
    proof: Proof {
        requests: Verification::Allowed,
        opt_out: Verification::Allowed,
        citation: "Lei 13.709/2018 Art. 18 § 3",
    },
    deletion: Deletion {
        scope: Scope::AboutThePerson,
        citation: "Lei 13.709/2018 Art. 18(IV), (VI)",
    },
    // From Acre to Fernando de Noronha.
    zones: Zones {
        received_in: "America/Rio_Branco",
        ends_in: "America/Noronha",
    },
    counting: "Código Civil Art. 132: the first day is excluded, the last included",
    uncertain: Some(
        "The 15 days are written for the full statement on access; for deletion, correction and objection the law \
         leaves the period to regulation (Art. 18 § 5), and none was found: 15 days are taken for all. \"Immediately\", \
         for a short confirmation, has no clock here. Art. 18 § 3 speaks of the request of the person or their \
         representative and not of proof. Known from translations and secondary sources; the Código Civil was not read.",
    ),
};

static KR_PIPA: Rules = Rules {
    regime: Regime::KrPipa,
    id: "kr-pipa",
    title: "Personal Information Protection Act of Korea",
    grants: EVERY,
    answer: Clock {
        period: after_receipt(10, Unit::CalendarDays),
        citation: "PIPA Art. 35-37; Enforcement Decree Art. 41, 43(3), 44(2)",
    },
    opt_out: None,
    acknowledge: None,
    extension: None,
    proof: Proof {
        requests: Verification::Allowed,
        opt_out: Verification::Allowed,
        citation: "PIPA Enforcement Decree Art. 46",
    },
    deletion: Deletion {
        scope: Scope::AboutThePerson,
        citation: "PIPA Art. 36(1)-(3)",
    },
    zones: one_zone("Asia/Seoul"),
    counting: "Civil Act Art. 157: the first day is not counted",
    uncertain: Some(
        "Read in English translation; Art. 46 of the Decree and the Civil Act were not read. The opt-out is the suspension of Art. 37. Access \
         may be postponed for cause (Art. 35(3)), which has no latest day and is no extension here.",
    ),
};
