"""The certificate: what is claimed, and what a new measurement says against it.

In: audits and damage. Out: `certificate.json`, or a list of what doesn't match one. May import
`core`, `data`, `settings`, `model` and `measure`.
"""

from typing import TYPE_CHECKING

from memlaw.core.lazy import lazy_exports

if TYPE_CHECKING:
    from memlaw.certify.certificate import Certificate as Certificate
    from memlaw.certify.certificate import make_certificate as make_certificate
    from memlaw.certify.certificate import read_certificate as read_certificate
    from memlaw.certify.check import CertificateCheck as CertificateCheck
    from memlaw.certify.check import check_certificate as check_certificate
    from memlaw.certify.folder import certify_adapter as certify_adapter

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "certificate": ["Certificate", "make_certificate", "read_certificate"],
        "folder": ["certify_adapter"],
        "check": ["CertificateCheck", "check_certificate"],
    },
)
