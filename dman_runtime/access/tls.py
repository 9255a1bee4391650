"""TLS of the server. Certificates are read again when their files change; running connections keep the old ones."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import grpc

from dman_runtime.access.certificates import CertificateFiles, Certificates, read_certificates
from dman_runtime.access.files import signature
from dman_runtime.errors import DmanError

logger = logging.getLogger(__name__)


def server_credentials(cert: Path, key: Path, client_ca: Path | None) -> grpc.ServerCredentials:
    """What `add_secure_port` takes. Raises UsageError for files that cannot be used now.

    cert: the certificate and its chain, PEM; key: its private key; client_ca: clients must show a certificate that one
    of these signed. Changed files are used from the next connection on. If they cannot be used, the old ones stay.
    """
    source = CertificateSource(CertificateFiles(cert, key, client_ca))
    return grpc.dynamic_ssl_server_credentials(
        _configuration(source.certificates),
        source.fetch,  # type: ignore[arg-type]  # the stubs do not know that None means no change
        require_client_authentication=client_ca is not None,
    )


class CertificateSource:
    """The certificates now, and the changes of their files since."""

    def __init__(self, files: CertificateFiles) -> None:
        """Raises UsageError for files that cannot be used."""
        self._files, self._lock, self._reported = files, threading.Lock(), ""
        self._read_at = signature(files.paths)
        self.certificates: Certificates = read_certificates(files)
        logger.info("TLS certificate %s, valid until %s", files.cert, self.certificates.valid_until)

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """What gRPC calls before each handshake, on a thread of its own. None: no change."""
        with self._lock:
            found = signature(self._files.paths)
            if found == self._read_at:
                return None
            self._read_at = found
            return self._changed()

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        try:
            certificates = read_certificates(self._files)
        except DmanError as error:
            if str(error) != self._reported:
                logger.error("kept the TLS certificate known before: %s", error)
            self._reported = str(error)
            return None
        self._reported = ""
        if certificates == self.certificates:
            return None
        logger.info("new TLS certificate %s, valid until %s", self._files.cert, certificates.valid_until)
        self.certificates = certificates
        return _configuration(certificates)


def _configuration(certificates: Certificates) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(certificates.key, certificates.cert)], root_certificates=certificates.client_ca
    )
