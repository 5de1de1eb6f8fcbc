package kms

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// pykmip is what PyKMIP's client library does with a KMS: the life of a key, a
// key of its own, a key pair, and that errors are told as it expects.
const pykmip = `
import sys
from kmip.pie.client import ProxyKmipClient
from kmip.pie import exceptions, objects
from kmip import enums
host, port, d = sys.argv[1], int(sys.argv[2]), sys.argv[3]
c = ProxyKmipClient(hostname=host, port=port, cert=d+'/client.pem', key=d+'/client.key', ca=d+'/ca.pem', ssl_version='PROTOCOL_TLSv1_2', kmip_version=enums.KMIPVersion.KMIP_1_2)
with c:
    uid = c.create(enums.CryptographicAlgorithm.AES, 256, name='pykmip-1', cryptographic_usage_mask=[enums.CryptographicUsageMask.ENCRYPT, enums.CryptographicUsageMask.DECRYPT])
    assert c.locate(attributes=None) == [uid]
    key = c.get(uid)
    assert len(key.value) == 32 and key.cryptographic_algorithm == enums.CryptographicAlgorithm.AES
    c.activate(uid)
    ivct, iv = c.encrypt(b'0123456789abcdef', uid=uid, cryptographic_parameters={'cryptographic_algorithm': enums.CryptographicAlgorithm.AES, 'block_cipher_mode': enums.BlockCipherMode.CBC, 'padding_method': enums.PaddingMethod.PKCS5}, iv_counter_nonce=b'\x01'*16)
    assert c.decrypt(ivct, uid=uid, cryptographic_parameters={'cryptographic_algorithm': enums.CryptographicAlgorithm.AES, 'block_cipher_mode': enums.BlockCipherMode.CBC, 'padding_method': enums.PaddingMethod.PKCS5}, iv_counter_nonce=b'\x01'*16) == b'0123456789abcdef'
    names = c.get_attribute_list(uid)
    assert 'State' in names and 'Name' in names, names
    _, attributes = c.get_attributes(uid, ['State'])
    assert attributes[0].attribute_value.value == enums.State.ACTIVE
    try:
        c.destroy(uid)
        assert False, 'an active key was destroyed'
    except exceptions.KmipOperationFailure as e:
        assert e.reason == enums.ResultReason.PERMISSION_DENIED, e
    c.revoke(enums.RevocationReasonCode.CESSATION_OF_OPERATION, uid)
    c.destroy(uid)
    try:
        c.get(uid)
        assert False, 'a destroyed key was given out'
    except exceptions.KmipOperationFailure as e:
        assert e.reason == enums.ResultReason.ITEM_NOT_FOUND, e
    own = objects.SymmetricKey(enums.CryptographicAlgorithm.AES, 128, b'\x07'*16, masks=[enums.CryptographicUsageMask.ENCRYPT], name='pykmip-2')
    assert c.get(c.register(own)).value == b'\x07'*16
    secret = objects.SecretData(b'correct horse', enums.SecretDataType.PASSWORD)
    assert c.get(c.register(secret)).value == b'correct horse'
    public, private = c.create_key_pair(enums.CryptographicAlgorithm.RSA, 2048, public_usage_mask=[enums.CryptographicUsageMask.VERIFY], private_usage_mask=[enums.CryptographicUsageMask.SIGN])
    assert c.get(public).key_format_type == enums.KeyFormatType.PKCS_1 and c.get(private).cryptographic_length == 2048
    c.activate(public)
    c.activate(private)
    how = {'digital_signature_algorithm': enums.DigitalSignatureAlgorithm.SHA256_WITH_RSA_ENCRYPTION}
    signature = c.sign(b'a message', uid=private, cryptographic_parameters=how)
    assert c.signature_verify(b'a message', signature, uid=public, cryptographic_parameters=how) == enums.ValidityIndicator.VALID
    assert c.signature_verify(b'another', signature, uid=public, cryptographic_parameters=how) == enums.ValidityIndicator.INVALID
print('fine')
`

// TestPyKMIPClient has PyKMIP's client library (Debian: python3-pykmip) use the
// KMS.
func TestPyKMIPClient(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "kms")
	b := start(t, dir)
	host, port, _ := strings.Cut(b.addr, ":")
	cmd := exec.CommandContext(t.Context(), "/usr/bin/python3", "-c", pykmip, host, port, dir)
	if out, err := cmd.CombinedOutput(); err != nil || !strings.HasSuffix(string(out), "fine\n") {
		t.Errorf("%v\n%s", err, out)
	}
}
